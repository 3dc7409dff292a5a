"""A reward model: made of a language model, loaded, adapted, merged, saved, and read by others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftlib import adapters
from ftlib.adapters.fused import FusedLoraLinear
from ftlib.adapters.task import score_head
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.export import CardData, save
from ftlib.models import as_reward_model, forward, load
from ftlib.models.checkpointing import enable_checkpointing
from tests.data.tokenizers_zoo import tiny
from tests.models.tiny_gguf import write_gguf
from tests.models_zoo import ARCHITECTURES, EOS, tiny_model
from tests.packed import random_groups

# peft 0.21 reads a property of models by the name it had before transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

GROUPS = random_groups()
for ids_L in (ids for group in GROUPS for ids in group.continuation_ids[::2]):
    ids_L[-1] = EOS  # half the rows are finished completions
BATCH = collate(GROUPS)
ROWS = [torch.cat([group.prefix_ids, ids]) for group in GROUPS for ids in group.continuation_ids]
CARD = CardData("tiny")
VARIANTS: dict[str, Any] = {
    "lora": adapters.lora(r=2),
    "dora": adapters.lora(r=2, dora=True),
    "with modules": adapters.lora(r=2, modules_to_save=["score"]),
    "peft without task": LoraConfig(r=2, target_modules=["q_proj"]),
    "peft of another task": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def scores(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, forward(model, BATCH, scores=True).scores_CK)


def own_scores(model: nn.Module) -> Tensor:
    """Transformers' own, one unpadded row at a time."""
    with torch.no_grad():
        return torch.cat([model(input_ids=row_L[None]).logits for row_L in ROWS])


def padded_scores(model: nn.Module, tokenizer: PreTrainedTokenizerBase, side: str) -> Tensor:
    """Transformers' own, of all rows in one batch as the tokenizer pads them."""
    batch = tokenizer.pad({"input_ids": ROWS}, padding_side=side, return_tensors="pt")
    assert not batch["attention_mask"].all()
    positions_CL = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # GPT-2 does not count from the mask
    with torch.no_grad():
        return cast(Tensor, model(**batch, position_ids=positions_CL).logits)


def moved(model: nn.Module) -> Any:
    """The model after what stands for training: every trainable weight moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny(pad="</s>")


@pytest.fixture
def language(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A language model that pads with EOS, as its tokenizer does."""
    eos = tokenizer.eos_token_id
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos)


@pytest.fixture
def folder(tmp_path: Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    language.save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    return tmp_path / "language"


# --- made of a language model -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_body_is_shared_and_the_class_is_transformers_own(arch: str) -> None:
    language = tiny_model(arch)
    config = copy.deepcopy(language.config.to_dict())
    reward = as_reward_model(language)
    auto = AutoModelForSequenceClassification.from_config(reward.config)
    assert type(reward) is type(auto)
    assert {name: weight.shape for name, weight in reward.named_parameters()} == {
        name: weight.shape for name, weight in auto.named_parameters()
    }
    assert reward.base_model is language.base_model
    assert language.config.to_dict() == config
    assert_close(scores(reward), own_scores(reward), rtol=1e-5, atol=1e-5)
    assert_close(
        forward(reward, BATCH, scores=True, hidden=True).last_CD,
        forward(language, BATCH, hidden=True).last_CD,
    )


def test_the_head_is_drawn_from_its_distribution_and_fixed_by_the_seed() -> None:
    """10,000 weights: mean and deviation within five standard errors of 0 and 1 / sqrt(10,001)."""
    width = 10_000
    language = tiny_model(hidden_size=width, num_hidden_layers=0, vocab_size=4, num_attention_heads=1250)
    torch.manual_seed(3)
    first = cast(nn.Linear, score_head(as_reward_model(language)))
    std = (width + 1) ** -0.5
    assert first.weight.shape == (1, width)
    assert first.bias is None
    assert abs(first.weight.mean().item()) < 5 * std / width**0.5
    assert abs(first.weight.std().item() / std - 1) < 5 / (2 * width) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(first.weight, cast(Tensor, as_reward_model(language).score.weight))
    assert not torch.equal(first.weight, cast(Tensor, as_reward_model(language).score.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_float32_and_trained_whatever_the_body(dtype: torch.dtype) -> None:
    reward = as_reward_model(tiny_model().to(dtype).requires_grad_(False))
    assert reward.score.weight.dtype == torch.float32
    assert [name for name, weight in reward.named_parameters() if weight.requires_grad] == ["score.weight"]
    assert scores(reward).dtype == torch.float32
    assert not reward.training


def test_the_config_tells_of_one_score(tmp_path: Path) -> None:
    as_reward_model(tiny_model()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["problem_type"]) == ({"0": "score"}, "regression")


def test_a_reward_model_is_one_already() -> None:
    reward = as_reward_model(tiny_model())
    assert as_reward_model(reward) is reward
    adapted = adapters.attach(reward, adapters.lora(r=2))
    assert as_reward_model(adapted) is adapted


def test_what_cannot_become_a_reward_model_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"adapters \['default'\]\. .*ftlib\.adapters\.merge"):
        as_reward_model(adapters.attach(tiny_model(), adapters.lora(r=2)))
    with pytest.raises(ConfigError, match="got a classifier of 3 labels"):
        as_reward_model(tiny_model(auto=AutoModelForSequenceClassification, num_labels=3))
    granite = CONFIG_MAPPING["granite"](
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(CapabilityError, match="got GraniteForCausalLM"):
        as_reward_model(AutoModelForCausalLM.from_config(granite))


# --- loaded -----------------------------------------------------------------------------------------


def test_a_language_models_folder_loads_as_a_reward_model(folder: Path, language: PreTrainedModel) -> None:
    torch.manual_seed(0)
    loaded, found = load(folder, task="reward")
    torch.manual_seed(0)
    assert_close(scores(loaded), scores(as_reward_model(language)))
    assert not loaded.training
    assert found.pad_token_id == loaded.config.pad_token_id != found.eos_token_id


def test_a_gguf_file_loads_as_a_reward_model(
    tmp_path: Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", language, tokenizer)
    torch.manual_seed(0)
    loaded, found = load(tmp_path / "tiny.gguf", task="reward", dtype="float32")
    torch.manual_seed(0)
    assert_close(scores(loaded), scores(as_reward_model(language)), rtol=1e-5, atol=1e-5)
    assert found.pad_token_id == loaded.config.pad_token_id != found.eos_token_id


def test_a_loaded_language_model_becomes_one_with_the_tokenizer_beside_it(folder: Path) -> None:
    language, _ = load(folder)
    reward, found = load(language, task="reward", adapter=adapters.lora(r=2))
    assert isinstance(reward, PeftModel)
    assert reward.get_base_model().base_model is language.base_model
    assert found is not None
    assert found.pad_token_id == reward.get_base_model().config.pad_token_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_reward_model_keeps_its_head_bit_for_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    trained, found = load(folder, task="reward", dtype=dtype)
    save(tmp_path / "reward", moved(trained), found, card=CARD)
    again, _ = load(tmp_path / "reward", task="reward", dtype=dtype)
    assert torch.equal(scores(again), scores(trained))
    assert again.score.weight.dtype == torch.float32
    assert again.config.pad_token_id == trained.config.pad_token_id


def test_a_head_is_found_in_any_shard(folder: Path, tmp_path: Path) -> None:
    trained, found = load(folder, task="reward", dtype="bfloat16")
    moved(trained).save_pretrained(tmp_path / "reward", max_shard_size="10KB")
    found.save_pretrained(tmp_path / "reward")
    assert len(list((tmp_path / "reward").glob("*.safetensors"))) > 1
    assert torch.equal(scores(load(tmp_path / "reward", task="reward", dtype="bfloat16")[0]), scores(trained))


def test_a_reward_model_of_others_gets_a_pad_id_that_ends_no_row(
    folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    theirs, _ = load(folder, task="reward")
    theirs.config.pad_token_id = tokenizer.eos_token_id
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours, found = load(tmp_path / "theirs", task="reward")
    assert ours.config.pad_token_id == found.pad_token_id == tokenizer.bos_token_id
    assert_close(scores(ours), scores(theirs))


def test_a_damaged_or_other_classifier_is_refused(folder: Path, tmp_path: Path) -> None:
    reward, found = load(folder, task="reward")
    save(tmp_path / "reward", reward, found, card=CARD)
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "reward" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1: score\.weight"):
        load(tmp_path / "reward", task="reward")
    three = tiny_model(auto=AutoModelForSequenceClassification, num_labels=3, vocab_size=len(found))
    save(tmp_path / "three", three, found, card=CARD)
    with pytest.raises(ConfigError, match="expected one score, got a classifier of 3 labels"):
        load(tmp_path / "three", task="reward")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=len(found), num_labels=1, **sizes))
    save(tmp_path / "encoder", encoder, found, card=CARD)
    with pytest.raises(CapabilityError, match="expected a decoder with a head named 'score', got Bert"):
        load(tmp_path / "encoder", task="reward")


def test_a_reward_model_is_not_taken_for_a_language_model() -> None:
    with pytest.raises(ConfigError, match=r"got one with a score head\. Pass task='reward'"):
        load(as_reward_model(tiny_model()))


# --- with an adapter --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_adapter_trains_the_head_and_saves_it(variant: str, tmp_path: Path) -> None:
    declared = copy.deepcopy(VARIANTS[variant])
    language = tiny_model().requires_grad_(False)
    model = cast(PeftModel, adapters.attach(as_reward_model(language), VARIANTS[variant]))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    heads = {name for name in trained if ".score." in name}
    assert heads == {"base_model.model.score.modules_to_save.default.weight"}
    assert trained - heads
    before = own_scores(model)
    cast(Tensor, forward(moved(model), BATCH, scores=True).scores_CK).sum().backward()
    assert all(
        cast(Tensor, weight.grad).any() for name, weight in model.named_parameters() if name in trained
    )
    assert not torch.allclose(own_scores(model), before)
    assert_close(scores(model), own_scores(model), rtol=1e-5, atol=1e-5)
    assert declared == VARIANTS[variant]
    assert "base_model.model.score.weight" in get_peft_model_state_dict(model)


def test_the_fused_projection_is_used_and_the_head_is_no_part_of_it() -> None:
    model = adapters.attach(as_reward_model(tiny_model()), adapters.lora(r=2))
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedLoraLinear)]
    assert len(fused) == 14  # two layers of seven matrices
    assert not any("score" in name for name in fused)


def test_the_head_of_an_adapter_on_a_bf16_base_is_float32() -> None:
    model = adapters.attach(as_reward_model(tiny_model().to(torch.bfloat16)), adapters.lora(r=2))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    scored = cast(Tensor, forward(model.train(), BATCH, scores=True).scores_CK)
    scored.sum().backward()
    assert scored.dtype == torch.float32
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_checkpointing_changes_no_gradient(arch: str) -> None:
    model = moved(adapters.attach(as_reward_model(tiny_model(arch)), adapters.lora(r=2))).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        cast(Tensor, forward(model, BATCH, scores=True).scores_CK).square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    kept = gradients()
    enable_checkpointing(model)
    recomputed = gradients()
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert_close(recomputed[name], value, rtol=1e-5, atol=1e-5)


def test_without_its_adapter_a_model_scores_as_its_base_did() -> None:
    base = as_reward_model(tiny_model())
    before = scores(base)
    model = moved(adapters.attach(base, adapters.lora(r=2)))
    assert not torch.allclose(scores(model), before)
    with model.disable_adapter():
        assert torch.equal(scores(model), before)


def test_two_adapters_have_a_head_each() -> None:
    model = moved(adapters.attach(as_reward_model(tiny_model()), adapters.lora(r=2), name="first"))
    first = scores(model)
    moved(adapters.attach(model, adapters.lora(r=2), name="second"))
    assert not torch.allclose(scores(model), first)
    model.set_adapter("first")
    assert torch.equal(scores(model), first)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_merging_gives_a_plain_model_with_equal_scores(arch: str) -> None:
    model = moved(adapters.attach(as_reward_model(tiny_model(arch)), adapters.lora(r=2)))
    expected = scores(model)
    merged = adapters.merge(model)
    assert type(merged) is type(as_reward_model(tiny_model(arch)))
    assert type(score_head(merged)) is nn.Linear
    assert_close(scores(merged), expected, rtol=1e-5, atol=1e-5)
    assert_close(own_scores(merged), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_reward_adapter_keeps_its_head_on_any_base(folder: Path, tmp_path: Path) -> None:
    model, found = load(folder, task="reward", adapter=adapters.lora(r=2))
    save(tmp_path / "adapter", moved(model), found, card=CARD)
    again, _ = load(folder, task="reward", adapter=tmp_path / "adapter")  # its base gets a head of its own
    assert_close(scores(again), scores(model), rtol=0, atol=1e-6)
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_an_adapter_of_the_other_kind_is_refused_by_what_to_do(folder: Path, tmp_path: Path) -> None:
    language, _ = load(folder, adapter=adapters.lora(r=2), dtype="float32")
    reward, _ = load(folder, task="reward", adapter=adapters.lora(r=2))
    save(tmp_path / "reward", reward, None, card=CARD)
    save(tmp_path / "writes", moved(language), None, card=CARD)
    with pytest.raises(CapabilityError, match=r"got the language model LlamaForCausalLM.*task='reward'"):
        load(folder, adapter=tmp_path / "reward")
    with pytest.raises(CapabilityError, match=r"score head, found none.*merge\("):
        load(folder, task="reward", adapter=tmp_path / "writes")
    expected_CD = forward(language, BATCH, hidden=True).last_CD
    merged, _ = load(adapters.merge(language), task="reward")
    found_CD = forward(merged, BATCH, scores=True, hidden=True).last_CD
    assert_close(found_CD, expected_CD, rtol=1e-5, atol=1e-5)


# --- read by others ---------------------------------------------------------------------------------


def test_plain_transformers_would_pool_before_the_terminator(language: PreTrainedModel) -> None:
    """What the pad id is for: with EOS, the scores are those of rows without their EOS."""
    reward = as_reward_model(language)
    reward.config.pad_token_id = EOS
    assert not torch.allclose(own_scores(reward), scores(reward), atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_a_saved_model_scores_padded_rows_alike_in_plain_transformers(
    arch: str, side: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    language = tiny_model(arch, vocab_size=len(tokenizer), eos_token_id=EOS, pad_token_id=EOS)
    model = moved(as_reward_model(language, tokenizer))
    save(tmp_path, model, tokenizer, card=CARD)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = padded_scores(plain, AutoTokenizer.from_pretrained(tmp_path), side)
    assert_close(found, scores(model), rtol=1e-5, atol=1e-5)
    assert tokenizer.pad_token_id == EOS


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saved_adapter_scores_alike_in_plain_peft(folder: Path, tmp_path: Path, side: str) -> None:
    model, found = load(folder, task="reward", adapter=adapters.lora(r=2), dtype="float32")
    save(tmp_path / "adapter", moved(model), found, card=CARD)
    padding = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=padding.pad_token_id
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_close(own_scores(plain), scores(model), rtol=1e-5, atol=1e-5)
    assert_close(padded_scores(plain, padding, side), scores(model), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, FusedLoraLinear) for module in plain.modules())
