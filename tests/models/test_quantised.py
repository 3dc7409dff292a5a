"""Quantised bases: one result in every mode and batch, float32 adapters, the way back to plain weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ftlib.adapters import Adapter, attach, full, ia3, load_adapter, lora, merge
from ftlib.adapters.quantised import is_quantised, quantised_layers
from ftlib.errors import CapabilityError, ConfigError, MissingPackageError
from ftlib.models import adapters_off, as_reward_model, forward, load, make_reference, on_same_base
from ftlib.models.checkpointing import enable_checkpointing
from ftlib.models.plan import plan_for
from ftlib.models.quantise import Quantisation
from ftlib.models.references import AdapterOff
from ftlib.trainers import DPOTrainer, RewardTrainer, SFTTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.packed import own_logprobs, random_batch, random_groups
from tests.quantised_zoo import KINDS, WIDE, quantised_model
from tests.trainers.ppo_tiny import ppo
from tests.trainers.preferences import PAIRS, moved, preference_trainer
from tests.trainers.tiny import rows

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")

BATCH = random_batch()
IDS_BL = torch.arange(3, 13)[None]
both = pytest.mark.parametrize("kind", KINDS)


def logits(model: nn.Module, ids_BL: Tensor = IDS_BL) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids_BL).logits  # type: ignore[no-any-return]


def adapted(kind: Quantisation, arch: str = "llama", *, adapter: Adapter | None = None) -> Any:
    """With an adapter that has learnt something."""
    torch.manual_seed(0)
    return moved(attach(quantised_model(kind, arch), adapter or lora(4)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain tiny Llama with its tokenizer."""
    tokenizer = tiny(pad=None)
    tiny_model(vocab_size=len(tokenizer), **WIDE["llama"]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# -- one result, whatever the mode, the batch and the path -------------------------------------------


@both
def test_training_and_evaluation_compute_the_same(kind: Quantisation) -> None:
    """bitsandbytes' own int8 layers differ by .2 here between the two on a CPU."""
    model = adapted(kind)
    in_training = logits(model.train())
    assert torch.equal(logits(model.eval()), in_training)
    assert not model.training, "the mode of the model is its own"


@both
def test_gradients_flow_after_an_evaluation(kind: Quantisation) -> None:
    model = adapted(kind)
    logits(model.eval())
    forward(model.train(), BATCH).logprobs_N.sum().backward()
    found = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert len(found) == 2 * 14
    assert all(float(grad.abs().sum()) > 0 for grad in found)


@both
def test_int8_and_nf4_rows_do_not_depend_on_their_batch_mates(kind: Quantisation) -> None:
    """A threshold of 6, the library's default, moves int8 logits by .08 to .22."""
    model, others = adapted(kind), torch.randint(3, 97, (3, 10))
    together = logits(model, torch.cat([IDS_BL, others]))[:1]
    assert_close(together, logits(model), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_grouped_is_padded_is_one_row_at_a_time(kind: Quantisation, arch: str) -> None:
    model = adapted(kind, arch)
    assert plan_for(model).path == "grouped"
    gradients, logprobs = [], []
    for path in ("grouped", "padded"):
        model.zero_grad()
        logprobs_N = forward(model, BATCH, path=path).logprobs_N  # type: ignore[arg-type]
        logprobs_N.mean().backward()
        logprobs.append(logprobs_N.detach())
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert_close(logprobs[0], logprobs[1], rtol=1e-5, atol=2e-5)
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        alone = own_logprobs(model, random_groups()).logprobs_N
    assert_close(logprobs[0], alone, rtol=1e-5, atol=2e-5)


def test_an_outlier_threshold_is_refused(tmp_path: Path) -> None:
    tiny_model(**WIDE["llama"]).save_pretrained(tmp_path)
    six = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=six, dtype=torch.float32)
    with pytest.raises(CapabilityError, match=r"threshold, got 6\.0"):
        attach(model, lora(4))


# -- what is trained ----------------------------------------------------------------------------------


@both
def test_a_fresh_adapter_is_the_identity_and_switched_off_is_the_base(kind: Quantisation) -> None:
    base = logits(quantised_model(kind))
    model = attach(quantised_model(kind), lora(4))
    assert_close(logits(model), base, rtol=0, atol=1e-5)
    with adapters_off(moved(model)):
        assert torch.equal(logits(model), base)


@both
@pytest.mark.parametrize("adapter", [lora(4), lora(4, rslora=True), lora(4, dora=True), ia3()])
def test_two_steps_move_every_trained_weight_and_no_other(kind: Quantisation, adapter: Adapter) -> None:
    model = attach(quantised_model(kind), adapter)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (-forward(model, BATCH).logprobs_N.mean()).backward()
        optimizer.step()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) is not weight.requires_grad, name


@both
def test_adapter_and_head_are_float32_on_a_bfloat16_base(kind: Quantisation) -> None:
    """Whatever the head is called."""
    base = quantised_model(kind, dtype=torch.bfloat16)
    model = attach(as_reward_model(base), lora(4))
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert any("score" in name for name in trained)
    assert base.lm_head.weight.dtype == torch.bfloat16


@both
def test_every_linear_layer_of_the_body_is_quantised_and_adapted(kind: Quantisation) -> None:
    model = attach(quantised_model(kind), lora(4))
    names = {name.removesuffix(".base_layer") for name, _ in quantised_layers(model)}
    assert len(names) == 14
    assert {
        name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name
    } == names


@both
def test_checkpointing_changes_no_gradient(kind: Quantisation) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted(kind).train()
        if checkpointed:
            enable_checkpointing(model)
        forward(model, BATCH).logprobs_N.sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert gradients[1].keys() == gradients[0].keys()
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
    assert all(float(grad.abs().sum()) > 0 for grad in gradients[1].values())


@both
def test_full_fine_tuning_is_refused_with_the_reason(kind: Quantisation) -> None:
    model = quantised_model(kind)
    with pytest.raises(CapabilityError, match="integers, which have no gradient"):
        attach(model, full())
    with pytest.raises(CapabilityError, match=r"adapter=ftlib.adapters.lora\(\)"):
        SFTTrainer(model, rows(4))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_writes_into_the_base_is_refused(init: Any) -> None:
    with pytest.raises(CapabilityError, match=f"leaves a quantised base as it is, got '{init}'"):
        attach(quantised_model("nf4"), lora(4, init=init))


# -- trainers -----------------------------------------------------------------------------------------


@both
def test_dpo_starts_at_log_two_with_the_base_as_reference(kind: Quantisation) -> None:
    trainer = preference_trainer(DPOTrainer, model=quantised_model(kind), max_tokens=60)
    assert isinstance(make_reference("auto", trainer.model), AdapterOff)
    assert trainer.step(PAIRS[:4])["loss"] == pytest.approx(0.693147, abs=1e-5)


@both
def test_a_reward_model_learns(kind: Quantisation) -> None:
    model = as_reward_model(quantised_model(kind))
    trainer = preference_trainer(RewardTrainer, model=model, max_steps=8, learning_rate=5e-3)
    history = trainer.train().history
    assert history[-1]["loss"] < history[0]["loss"]


@both
def test_ppo_starts_at_ratio_one(kind: Quantisation) -> None:
    trainer = ppo(model=quantised_model(kind), max_tokens=20)
    row = trainer.update(trainer.rollout(trainer.train_data))
    assert row["first_ratio_deviation"] < 1e-5
    assert row["sampler_ratio"] == pytest.approx(1.0, abs=1e-5)


@both
def test_a_critic_has_its_adapter_on_the_quantised_base(kind: Quantisation) -> None:
    trainer = ppo(model=quantised_model(kind), critic="adapter", max_tokens=20)
    row = trainer.update(trainer.rollout(trainer.train_data))
    assert row["first_ratio_deviation"] < 1e-5


@both
def test_roles_share_the_quantised_base(kind: Quantisation) -> None:
    """A reward model on the policy's base: a step of the policy leaves its scores alone."""
    policy = adapted(kind)
    role = as_reward_model(on_same_base(policy))
    role = moved(attach(role, lora(4)), seed=2)
    mine = {id(module) for _, module in quantised_layers(policy)}
    assert {id(module) for _, module in quantised_layers(role)} == mine
    before = forward(role, BATCH, scores=True).scores_CK
    moved(policy, seed=3)
    assert torch.equal(forward(role, BATCH, scores=True).scores_CK, before)


# -- loading, saving, and the way back -----------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "adapter", [lora(4), lora(4, dora=True), lora(4, modules_to_save=["lm_head"]), ia3()]
)
def test_merging_gives_a_plain_copy_with_equal_logits(kind: Quantisation, adapter: Adapter) -> None:
    model = adapted(kind, adapter=adapter)
    expected = logits(model)
    merged = merge(model)
    assert_close(logits(merged), expected, rtol=1e-5, atol=5e-5)
    assert not is_quantised(merged)
    assert getattr(merged.config, "quantization_config", None) is None
    assert torch.equal(logits(model), expected), "the model itself stays"


@both
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_quantised_model_without_adapter_merges_to_its_plain_weights(
    kind: Quantisation, arch: str, tmp_path: Path
) -> None:
    model = quantised_model(kind, arch)
    merged = merge(model)
    assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(logits(again.eval()), logits(merged), rtol=0, atol=1e-5)


@both
def test_an_adapter_saved_from_a_quantised_base_is_plain_peft(kind: Quantisation, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    again = load_adapter(quantised_model(kind), tmp_path)
    assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    plain = PeftModel.from_pretrained(quantised_model(kind), str(tmp_path)).eval()
    assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)


@both
@pytest.mark.parametrize("task", ["causal_lm", "reward"])
def test_load_quantises_freezes_and_takes_the_adapter_back(
    kind: Quantisation, task: str, folder: Path, tmp_path: Path
) -> None:
    model, _ = load(folder, task=task, quantize=kind, dtype="float32", adapter=lora(4))
    moved(model).save_pretrained(tmp_path / "adapter")
    again, _ = load(folder, task=task, quantize=kind, dtype="float32", adapter=tmp_path / "adapter")
    assert is_quantised(again)
    assert_close(logits(again.eval()), logits(model.eval()), rtol=0, atol=1e-6)
    plain, _ = load(folder, quantize=kind)
    assert not any(weight.requires_grad for weight in plain.parameters())


@both
def test_the_head_of_an_encoder_classifier_stays_plain_and_is_trained(
    kind: Quantisation, tmp_path: Path
) -> None:
    """New in this checkpoint, of a masked language model: its pooler and its classifier."""
    tokenizer = tiny(pad=None)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, task="classification", num_labels=3, quantize=kind, adapter=lora(4))
    names = {name.removeprefix("base_model.model.") for name, _ in quantised_layers(model)}
    assert len(names) == 6
    assert not any("pooler" in name or "classifier" in name for name in names)
    model(input_ids=IDS_BL).logits.sum().backward()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    heads = [weight for name, weight in trained.items() if "pooler" in name or "classifier" in name]
    assert len(heads) == 4
    assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in heads)


@both
def test_an_encoder_decoder_trains_on_a_quantised_base(kind: Quantisation, tmp_path: Path) -> None:
    tokenizer = tiny(pad=None)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load(tmp_path, task="seq2seq_lm", quantize=kind, dtype="float32", adapter=lora(4))
    pairs = {"input_ids": IDS_BL, "labels": IDS_BL + 5}
    model(**pairs).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    with torch.no_grad():
        expected = moved(model).eval()(**pairs).logits
        assert_close(merge(model)(**pairs).logits, expected, rtol=1e-5, atol=5e-5)


@both
def test_the_dtype_of_a_quantised_base_is_that_of_a_frozen_one(kind: Quantisation, folder: Path) -> None:
    frozen, _ = load(folder, adapter=lora(4))
    packed, _ = load(folder, quantize=kind)
    assert packed.dtype == packed.lm_head.weight.dtype == frozen.lm_head.weight.dtype


def test_without_bitsandbytes_the_install_command_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(MissingPackageError, match=r"pip install 'ftlib\[quant\]'"):
        load(folder, quantize="nf4")


def test_quantising_what_cannot_be_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'int8', 'nf4'\], got 'int4'"):
        load(folder, quantize="int4")
    with pytest.raises(ConfigError, match="quantize has no effect on a loaded model"):
        load(tiny_model(), quantize="nf4")  # type: ignore[call-overload]
