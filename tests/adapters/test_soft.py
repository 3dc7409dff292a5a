"""Soft prompts as declarations: what they train, what they start from, what they can do."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import CPTConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils.peft_types import PeftType
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ftlib.adapters import (
    Adapter,
    attach,
    capabilities_of,
    load_adapter,
    lora,
    merge,
    p_tuning,
    prefix,
    prompt,
)
from ftlib.errors import CapabilityError, ConfigError
from ftlib.export.save import save_weights
from ftlib.models import forward
from ftlib.models.adapted import is_identity
from ftlib.models.parts import inner_model
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import ARCHITECTURES, EOS, tiny_model
from tests.packed import random_batch
from tests.virtual import SOFT, soft_model

N, D, LAYERS, KV = 5, 32, 2, 16  # of the tiny Llama: 2 key/value heads of width 8


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words between blanks; it begins plain text with BOS."""
    return tiny("words", template=None, bos=True)


def trained(model: PeftModel | PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


# -- how many weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "count"),
    [
        (prompt(N), N * D),
        (p_tuning(N, encoder="mlp"), N * D + 3 * (D**2 + D)),
        (p_tuning(N), N * D + 46 * D**2 + 35 * D),
        (p_tuning(N, hidden=D // 2), N * D + 14 * D**2 + 18 * D),  # the paper's
        (prefix(N), 2 * N * LAYERS * KV),
        (prefix(N, projection=True), N * KV + (KV + 1) * KV + (KV + 1) * 2 * LAYERS * KV),
        (prefix(N, projection=True, hidden=9), N * KV + (KV + 1) * 9 + (9 + 1) * 2 * LAYERS * KV),
    ],
    ids=["prompt", "mlp", "lstm", "half lstm", "prefix", "projection", "narrow projection"],
)
def test_the_trained_weights_are_as_many_as_the_formula_says(adapter: Adapter, count: int) -> None:
    model = attach(tiny_model(), adapter)
    assert trained(model) == count
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_f11_widths_of_keys_and_values_are_those_of_the_architecture(arch: str) -> None:
    config = inner_model(tiny_model(arch)).config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert trained(soft_model("prefix", arch)) == 2 * N * LAYERS * heads * 8


def test_prompts_have_the_width_of_the_embedding_where_it_is_not_that_of_the_states() -> None:
    model = attach(tiny_model("opt", word_embed_proj_dim=16), prompt(N))
    assert trained(model) == N * 16
    assert forward(model, random_batch()).logprobs_N.isfinite().all()


def test_weights_are_float32_on_a_bfloat16_base() -> None:
    for make in SOFT.values():
        model = attach(tiny_model().to(torch.bfloat16), make())
        assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
        assert forward(model, random_batch()).logprobs_N.isfinite().all()


# -- what they can do --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: prompt(7), lambda: p_tuning(7), lambda: p_tuning(7, encoder="mlp")])
def test_prompts_declare_rows_that_share_a_flat_row(make) -> None:  # type: ignore[no-untyped-def]
    declared = make().capabilities
    assert (declared.adds_positions, declared.virtual_tokens, declared.needs_cache) == (7, 7, False)
    assert declared.groupable
    assert declared.checkpointable
    assert (declared.mergeable, declared.identity_init, declared.off_is_base) == (False, False, True)


@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_declare_a_cache(projection: bool) -> None:
    declared = prefix(7, projection=projection).capabilities
    assert (declared.adds_positions, declared.virtual_tokens, declared.needs_cache) == (0, 7, True)
    assert not declared.groupable
    assert not declared.checkpointable
    assert (declared.mergeable, declared.identity_init, declared.off_is_base) == (False, False, True)


@pytest.mark.parametrize("kind", list(SOFT))
def test_default_rates_are_those_that_virtual_tokens_learn_at(kind: str) -> None:
    assert 1e-3 <= SOFT[kind]().capabilities.learning_rate <= 1e-2


def test_f12_a_prefix_of_zeros_is_not_called_the_identity() -> None:
    """Its keys take a share of the attention, exp(0) each, and its values give nothing for it."""
    config = PrefixTuningConfig(num_virtual_tokens=N, init_weights="zero")
    assert not capabilities_of(config).identity_init
    model = attach(tiny_model(), config).eval()
    assert not is_identity(model)
    found, base = (forward(m, random_batch()).logprobs_N for m in (model, tiny_model()))
    assert float((found - base).abs().max().detach()) > 0.1


@pytest.mark.parametrize("kind", list(SOFT))
def test_virtual_tokens_are_never_the_identity_and_never_merged(kind: str) -> None:
    model = soft_model(kind)
    assert not is_identity(model)
    with pytest.raises(CapabilityError, match="expected an adapter that adds to weights"):
        merge(model)


def test_other_kinds_of_virtual_tokens_are_refused_by_name() -> None:
    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[0, 1], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]
    )
    with pytest.raises(CapabilityError, match="CPT"):
        capabilities_of(config)


def test_a_configuration_without_a_number_of_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens >= 1 for PROMPT_TUNING, got None"):
        capabilities_of(PromptTuningConfig())


# -- F21: with another adapter -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_f21_around_lora_is_refused_and_lora_stays_trained(kind: str) -> None:
    model = attach(tiny_model(), lora(4))
    before = trained(model)
    with pytest.raises(
        CapabilityError, match=r"LORA, got P.*_TUNING: one of the two would be frozen silently"
    ):
        attach(model, SOFT[kind](), name="soft")
    assert trained(model) == before


def test_f21_lora_around_a_prompt_is_refused() -> None:
    with pytest.raises(CapabilityError, match="PROMPT_TUNING, got LORA"):
        attach(soft_model("prompt"), lora(4), name="lora")


def test_f21_peft_models_one_around_the_other_are_refused() -> None:
    with pytest.warns(UserWarning, match="for a second time"):
        nested = get_peft_model(attach(tiny_model(), lora(4)), prompt(N).config)  # type: ignore[arg-type]
    with pytest.raises(CapabilityError, match="expected a causal language model"):
        forward(nested, random_batch())


# -- what they start from ----------------------------------------------------------------------


def rows_of(model: PeftModel) -> torch.Tensor:
    return model.prompt_encoder["default"].embedding.weight.detach()


def table() -> torch.Tensor:
    return tiny_model().get_input_embeddings().weight.detach()


def test_a_prompt_starts_from_rows_of_the_vocabulary_each_another() -> None:
    rows = rows_of(attach(tiny_model(), prompt(20)))
    places = [int((table() == row).all(-1).nonzero()[0, 0]) for row in rows]
    assert len(set(places)) == 20
    assert not {0, 1, EOS} & set(places)  # special tokens


def test_vocabulary_rows_depend_on_the_global_seed_alone() -> None:
    torch.manual_seed(3)
    first = rows_of(attach(tiny_model(), prompt(20)))
    torch.manual_seed(3)
    assert torch.equal(rows_of(attach(tiny_model(), prompt(20))), first)
    assert not torch.equal(rows_of(attach(tiny_model(), prompt(20))), first)


def test_a_prompt_starts_from_a_text_without_special_tokens_repeated() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer("The quick brown", add_special_tokens=False).input_ids
    for adapter, given in (
        (prompt(7, init="text", text="The quick brown", tokenizer=tokenizer), None),
        (prompt(7, init="text", text="The quick brown"), tokenizer),
    ):
        rows = rows_of(attach(tiny_model(), adapter, tokenizer=given))
        assert torch.equal(rows, table()[(ids * 3)[:7]])


def test_a_prompt_starts_from_the_mean_of_each_label_then_from_the_vocabulary() -> None:
    tokenizer = word_tokenizer()
    rows = rows_of(
        attach(tiny_model(), prompt(4, init="labels", labels=["The quick", "fox"], tokenizer=tokenizer))
    )
    means = [table()[tokenizer(x, add_special_tokens=False).input_ids].mean(0) for x in ("The quick", "fox")]
    assert_close(rows[:2], torch.stack(means))
    assert all((table() == row).all(-1).any() for row in rows[2:])


def test_random_prompts_are_pefts() -> None:
    torch.manual_seed(0)
    rows = rows_of(attach(tiny_model(), prompt(200, init="random")))
    assert float(rows.std()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_i1_a_prefix_of_a_text_says_what_the_model_says_after_that_text(arch: str) -> None:
    """Log-probabilities of every token, the text standing before it as ordinary tokens."""
    tokenizer, text = word_tokenizer(), "The quick brown fox says Paris is the capital"
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    adapter = prefix(len(ids), init="text", text=text, tokenizer=tokenizer)
    model, base = attach(tiny_model(arch), adapter).eval(), tiny_model(arch)
    row = torch.arange(20, 33)
    with torch.no_grad():
        expected = base(torch.cat([ids, row])[None]).logits[0, len(ids) :]
        found = model(row[None]).logits[0]
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_starts_from_the_vocabulary_at_the_scale_of_real_keys() -> None:
    model = attach(tiny_model(), prefix(N, init="vocab"))
    drawn = attach(tiny_model(), prefix(N))
    assert not torch.equal(rows_of(model), rows_of(drawn))
    assert forward(model, random_batch()).logprobs_N.isfinite().all()


def test_a_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a tokenizer .* tokenizer="):
        attach(tiny_model(), prompt(N, init="text", text="The quick brown"))


def test_the_tokenizer_beside_the_model_is_found(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path)
    base = tiny_model()
    base.name_or_path = str(tmp_path)
    assert rows_of(attach(base, prompt(N, init="text", text="The quick brown"))).shape == (N, D)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: prompt(0), "prompt: tokens: expected a whole number >= 1, got 0"),
        (lambda: p_tuning(-1), "p_tuning: tokens: expected a whole number >= 1, got -1"),
        (lambda: prefix(0), "prefix: tokens: expected a whole number >= 1, got 0"),
        (lambda: prompt(init="zero"), "got 'zero'"),
        (lambda: prompt(text="a"), "init='vocab' with text. Say init='text'"),
        (lambda: prompt(init="text"), "init='text' without text. Give text="),
        (lambda: prompt(init="labels", text="a"), "init='labels' with text"),
        (lambda: prompt(init="labels"), "init='labels' without labels"),
        (lambda: prompt(init="random", tokenizer=word_tokenizer()), "tokenizer has no effect"),
        (lambda: p_tuning(encoder="gru"), "got 'gru'"),
        (lambda: p_tuning(hidden=0), "hidden: expected a whole number >= 1, or None, got 0"),
        (lambda: prefix(hidden=8), "hidden has no effect without projection=True"),
        (lambda: prefix(init="text"), "init='text' without text"),
        (lambda: prefix(init="labels"), "got 'labels'"),
        (lambda: prefix(projection=True, init="vocab"), "init='random' with projection=True, got 'vocab'"),
        (
            lambda: attach(tiny_model(), prompt(init="text", text="", tokenizer=word_tokenizer())),
            "at least one token",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words):
        make()


# -- saved and loaded --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("kind", list(SOFT))
def test_f4_f28_what_is_saved_is_what_plain_peft_reads(kind: str, name: str, tmp_path: Path) -> None:
    model, row = soft_model(kind, name=name), torch.arange(5, 14)[None]
    save_weights(tmp_path, model)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert_close(plain(row).logits, model(row).logits, rtol=1e-6, atol=1e-6)
    ours = load_adapter(tiny_model(), tmp_path, name="again", trainable=False)
    assert_close(forward(ours, random_batch()).logprobs_N, forward(model, random_batch()).logprobs_N)
    assert trained(ours) == 0


@pytest.mark.parametrize("kind", list(SOFT))
def test_a_loaded_soft_prompt_is_trained_on_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    """An encoder is not in the export: what it gave is trained from there."""
    save_weights(tmp_path, soft_model(kind))
    model = attach(tiny_model(), tmp_path)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(weights) == 1
    before = forward(model, random_batch()).logprobs_N
    before.sum().backward()
    with torch.no_grad():
        weights[0] -= 0.01 * weights[0].grad.sign()
    assert not torch.equal(forward(model, random_batch()).logprobs_N, before)
    save_weights(tmp_path, model)
    row = torch.arange(5, 14)[None]
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert_close(plain(row).logits, model(row).logits, rtol=1e-6, atol=1e-6)


def test_saving_does_not_depend_on_the_mode(tmp_path: Path) -> None:
    """Dropout between the layers of an encoder would make the export a draw."""
    config = p_tuning(N).config
    config.encoder_dropout = 0.5  # type: ignore[union-attr]
    model = attach(tiny_model(), config)  # type: ignore[arg-type]
    row = torch.arange(5, 14)[None]
    save_weights(tmp_path, model.train())
    assert model.prompt_encoder.training
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert_close(plain(row).logits, model.eval()(row).logits, rtol=1e-6, atol=1e-6)


def test_the_callers_configuration_is_never_changed() -> None:
    for make in SOFT.values():
        adapter = make()
        before = adapter.config.to_dict()  # type: ignore[union-attr]
        attach(tiny_model(), adapter)
        assert adapter.config.to_dict() == before  # type: ignore[union-attr]


def test_kinds_are_named_as_their_factories() -> None:
    kinds = {adapter.kind: adapter.config.peft_type for adapter in (prompt(), p_tuning(), prefix())}  # type: ignore[union-attr]
    expected = {
        "prompt": PeftType.PROMPT_TUNING,
        "p_tuning": PeftType.P_TUNING,
        "prefix": PeftType.PREFIX_TUNING,
    }
    assert kinds == expected


def test_attaching_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for kind in SOFT:
            forward(soft_model(kind), random_batch())
    assert not caplog.records
