"""Virtual tokens in the one forward: any path and any batch is what peft computes of one unpadded row."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ftlib.adapters import attach, prefix, prompt
from ftlib.adapters.task import score_head
from ftlib.batches import Sampling
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, ConfigError, ShapeError
from ftlib.evaluation.generation import generate
from ftlib.models import Scorer, forward
from ftlib.models.checkpointing import enable_checkpointing
from ftlib.models.heads import new_value_head
from ftlib.models.parts import make_plan
from ftlib.models.plan import plan_for
from ftlib.models.roles import adapters_active, adapters_off
from ftlib.objectives import SFT
from ftlib.rollouts.transformers_sampler import TransformersSampler
from tests.models_zoo import ARCHITECTURES, EOS, VOCAB, WINDOW, tiny_model
from tests.packed import random_batch, random_groups
from tests.virtual import COUNT, SOFT, own_logprobs, soft_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = list(SOFT)
BOTH = ("prompt", "prefix")  # rows and a cache
COEFFICIENTS_N = torch.randn(random_batch().rows_N.shape, generator=torch.Generator().manual_seed(5))


def paths(model: nn.Module) -> list[str]:
    return ["grouped", "padded"] if plan_for(model).path == "grouped" else ["padded"]


def gradients(model: nn.Module, logprobs_N: Tensor, last_CD: Tensor) -> dict[str, Tensor]:
    """Of an arbitrary function of both outputs."""
    model.zero_grad()
    ((COEFFICIENTS_N * logprobs_N).sum() + (last_CD**2).sum() / 100).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# -- F5: documents of one batch ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "kind"), [*product(ARCHITECTURES, BOTH), *product(("llama", "gemma2"), KINDS)]
)
def test_f5_every_path_equals_single_rows_in_values_and_gradients(arch: str, kind: str) -> None:
    model, groups, batch = soft_model(kind, arch), random_groups(), random_batch()
    own = own_logprobs(model, groups)
    expected = gradients(model, own.logprobs_N, own.last_CD)
    size = torch.stack([x.norm() for x in expected.values()]).norm()
    assert expected.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(bool(gradient.any()) for gradient in expected.values())
    for path in paths(model):
        scored = forward(model, batch, hidden=True, path=path)
        assert_close(scored.logprobs_N, own.logprobs_N, **CLOSE)
        assert_close(scored.last_CD, own.last_CD, **CLOSE)
        for name, gradient in gradients(model, scored.logprobs_N, scored.last_CD).items():
            assert float((gradient - expected[name]).norm()) <= 1e-5 * float(size), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompts_share_a_flat_row_and_prefixes_do_not(arch: str) -> None:
    assert plan_for(soft_model("prompt", arch)).path == "grouped"
    assert plan_for(soft_model("prefix", arch)).path == "padded"


def test_a_flat_row_forced_on_a_prefix_is_refused() -> None:
    with pytest.raises(CapabilityError, match="does not share a row"):
        forward(soft_model("prefix"), random_batch(), path="grouped")


@pytest.mark.parametrize("kind", KINDS)
def test_no_document_changes_another_one(kind: str) -> None:
    model = soft_model(kind)
    groups, others = random_groups(), random_groups(seed=1)
    both = forward(model, collate([groups[1], others[2]], score_all=True)).logprobs_N
    alone = forward(model, collate([groups[1]], score_all=True)).logprobs_N
    assert_close(both[: len(alone)], alone, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_of_a_batch_has_its_gradient(kind: str) -> None:
    """sum(w nll) / sum(w) of five groups at once, one by one, and as 2 + 3."""
    model, groups = soft_model(kind), random_groups()
    found = []
    for cut in ([5], [1] * 5, [2, 3]):
        model.zero_grad()
        start = 0
        for size in cut:
            objective, batch = SFT(), collate(groups[start : start + size])
            objective(model, batch).loss({"nll": torch.tensor(50.0)}).backward()
            start += size
        found.append([w.grad for w in model.parameters() if w.grad is not None])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert float((one - two).norm()) <= 1e-5 * max(1.0, float(one.norm()))


# -- F22: what is counted ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f22_the_rows_scored_and_counted_are_those_without_the_adapter(kind: str) -> None:
    """Plain text: its first token has no row to predict it, though a virtual token stands before it."""
    model, batch = soft_model(kind), random_batch([(0, (7,)), (0, (3,))])
    assert forward(model, batch).logprobs_N.shape == (6 + 2,)
    with adapters_off(model):
        assert forward(model, batch).logprobs_N.shape == (6 + 2,)
    output = SFT()(model, batch)
    assert_close(output.terms["nll"].count, SFT().counts(batch)["nll"])


# -- F3: where heads read ----------------------------------------------------------------------


def classifier(kind: str, **changes: int) -> PeftModel:
    torch.manual_seed(0)
    reward = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1, **changes)
    model = attach(reward, SOFT[kind]())
    assert isinstance(model, PeftModel)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_f3_scores_are_read_at_the_last_token_of_each_answer(kind: str) -> None:
    """Of answers that end in the pad id, too: peft's own score of one row without a pad id."""
    model, groups = classifier(kind, pad_token_id=EOS), random_groups()
    groups[1].continuation_ids[0][-1] = EOS
    scores_C = forward(model, collate(groups, score_all=True), scores=True).scores_CK[:, 0]
    model.config.pad_token_id = None
    rows = [torch.cat([g.prefix_ids, ids]) for g in groups for ids in g.continuation_ids]
    own_C = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    assert_close(scores_C, own_C, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_read_at_the_states_of_the_text(kind: str) -> None:
    model, groups = soft_model(kind), random_groups()
    head = new_value_head(32)
    nn.init.normal_(head.weight)
    scored = forward(Scorer(model, value_head=head), collate(groups, score_all=True), values=True)
    assert_close(scored.end_values_C, head(own_logprobs(model, groups).last_CD)[:, 0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_f13_a_head_is_trained_and_saved_whatever_task_the_configuration_says(kind: str) -> None:
    config = SOFT[kind]().config
    config.task_type = None
    reward = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1)
    model = attach(reward, config)
    assert score_head(model).weight.requires_grad
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert config.task_type is None  # the caller's own object stays as it was


@pytest.mark.parametrize("kind", KINDS)
def test_f13_without_a_task_a_language_model_has_its_virtual_tokens(kind: str) -> None:
    config = SOFT[kind]().config
    config.task_type = None
    torch.manual_seed(0)
    model = attach(tiny_model(), config)
    ids_1L = torch.arange(3, 9)[None]
    assert not torch.allclose(model(ids_1L).logits[0, -1], tiny_model()(ids_1L).logits[0, -1], atol=1e-2)


# -- F1, F2, F9: padding on the left, and writing ----------------------------------------------

PROMPTS = [[5, 9, 33], [7, 8, 9, 10, 11, 12, 40, 41, 42], [50], list(range(20, 34)), [60, 61, 3, 4, 5, 6]]
NEW = 8


def greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """One unpadded row, without a cache of text."""
    ids = list(prompt)
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("arch", "kind"),
    [*product(("mistral", "gemma3_text", "gpt2", "opt"), BOTH), *(("llama", kind) for kind in KINDS)],
)
def test_f1_f2_rows_padded_on_the_left_are_written_as_single_rows(arch: str, kind: str) -> None:
    model = soft_model(kind, arch)
    with torch.no_grad():
        expected = [greedy(model, prompt) for prompt in PROMPTS]
    written = generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=NEW)
    sampling = Sampling(temperature=0, max_new_tokens=NEW, stop_ids=(EOS,))
    sampled = TransformersSampler(model).generate(PROMPTS, sampling, seed=0)
    assert written == expected
    assert [list(row.ids) for row in sampled] == expected


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_f1_f2_logits_of_left_padded_rows_equal_single_rows(arch: str, kind: str) -> None:
    model = soft_model(kind, arch)
    plan = make_plan(model, "padded", "test")
    ids_RL = torch.tensor([[0] * (14 - len(row)) + row for row in PROMPTS])
    mask_RL = torch.tensor([[0] * (14 - len(row)) + [1] * len(row) for row in PROMPTS])
    rows = plan.virtual.left_padded(plan.body, ids_RL, mask_RL)
    assert rows.mask_RL.sum(1).tolist() == [len(row) + COUNT for row in PROMPTS]
    cached = {} if rows.cache is None else {"past_key_values": rows.cache}
    states_RLD = plan.body(
        **rows.read, attention_mask=rows.mask_RL, position_ids=rows.positions_RL, **cached
    ).last_hidden_state
    own_RV = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in PROMPTS])
    assert_close(plan.head.logits(states_RLD[:, -1]), own_RV, **CLOSE)


def test_positions_count_virtual_tokens_and_text_and_no_pads() -> None:
    """Pads 0; [pads][virtual][text] starts the virtual tokens at 0 and the text at n."""
    plan = make_plan(soft_model("prompt"), "padded", "test")
    rows = plan.virtual.left_padded(
        plan.body, torch.tensor([[0, 0, 7], [7, 8, 9]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    )
    assert rows.mask_RL.tolist() == [[0, 0, *[1] * 6], [1] * 8]
    assert rows.positions_RL.tolist() == [[0, 0, *range(6)], list(range(8))]
    assert rows.ids_RL[:, -1].tolist() == [7, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_the_samplers_logprobs_are_those_of_the_forward(kind: str) -> None:
    model = soft_model(kind)
    rows = TransformersSampler(model).generate(PROMPTS, Sampling(n=2, max_new_tokens=NEW), seed=1)
    for place, row in enumerate(rows):
        group = random_groups([(len(PROMPTS[place // 2]), (len(row.ids),))])[0]
        group.prefix_ids[:] = torch.tensor(PROMPTS[place // 2])
        group.continuation_ids[0][:] = torch.as_tensor(row.ids)
        expected_N = forward(model, collate([group], score_all=True)).logprobs_N
        assert_close(torch.as_tensor(row.logprobs), expected_N.float(), **CLOSE)


@pytest.mark.parametrize("kind", BOTH)
def test_beams_equal_those_of_single_rows(kind: str) -> None:
    model, options = soft_model(kind), {"stop_ids": [EOS], "max_new_tokens": 5, "num_beams": 3}
    together = generate(model, None, PROMPTS, **options)
    assert together == [generate(model, None, [row], **options)[0] for row in PROMPTS]


@pytest.mark.parametrize("option", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("kind", BOTH)
def test_f9_another_cache_is_refused_by_name(kind: str, option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} cannot be chosen with virtual tokens"):
        generate(soft_model(kind), None, PROMPTS, stop_ids=[EOS], **option)


# -- F10: switched off -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f10_switched_off_is_the_base_bit_for_bit(kind: str) -> None:
    model, base, batch = soft_model(kind), tiny_model(), random_batch()
    ids_1L, mask_1L = torch.arange(3, 12)[None], torch.ones(1, 9, dtype=torch.long)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask_1L}
    before = forward(model, batch).logprobs_N
    with adapters_off(model):
        assert torch.equal(
            forward(model, batch, path="padded").logprobs_N, forward(base, batch, path="padded").logprobs_N
        )
        assert torch.equal(model(input_ids=ids_1L).logits, base(input_ids=ids_1L).logits)
        assert torch.equal(model.generate(ids_1L, **options), base.generate(ids_1L, **options))
        assert generate(model, None, PROMPTS, stop_ids=[EOS], max_new_tokens=4) == generate(
            base, None, PROMPTS, stop_ids=[EOS], max_new_tokens=4
        )
        with adapters_active(model, ["default"]):
            assert torch.equal(forward(model, batch).logprobs_N, before)
            assert model(input_ids=ids_1L).logits[0, -1].ne(base(input_ids=ids_1L).logits[0, -1]).any()
    assert torch.equal(forward(model, batch).logprobs_N, before)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("kind", KINDS)
def test_f10_a_classifier_is_switched_off_too(kind: str) -> None:
    model, ids_1L = classifier(kind), torch.arange(3, 12)[None]
    base = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1)
    with adapters_off(model):
        assert torch.equal(model(input_ids=ids_1L).logits, base(input_ids=ids_1L).logits)
    assert not torch.equal(model(input_ids=ids_1L).logits, base(input_ids=ids_1L).logits)


def test_f10_the_calls_come_back_after_an_exception() -> None:
    model = soft_model("prompt")
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert "forward" not in vars(model)
    assert not model._adapters_disabled


# -- F11: room ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_f11_text_that_leaves_no_position_is_refused_with_the_numbers(arch: str, kind: str) -> None:
    model = soft_model(kind, arch)
    assert forward(model, random_batch([(120, (3,))])).logprobs_N.isfinite().all()  # 5 + 123 of 128
    with pytest.raises(ShapeError, match=r"context of 128 tokens, got 5 \+ 124"):
        forward(model, random_batch([(120, (4,))]))
    with pytest.raises(ConfigError, match="context of 128 tokens, 5 of them virtual, got 123 in prompt 1"):
        generate(model, None, [[7] * 123], stop_ids=[EOS])
    with pytest.raises(ConfigError, match="context of 128 tokens, 5 of them virtual, got 123 in prompt 1"):
        TransformersSampler(model).generate([[7] * 123], Sampling(max_new_tokens=2), seed=0)
    assert len(generate(model, None, [[7] * 120], stop_ids=[EOS])[0]) <= 3


# -- F8: checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "p-tuning lstm", "p-tuning mlp"])
@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_f8_checkpointing_changes_neither_values_nor_gradients_of_prompts(kind: str, path: str) -> None:
    model, batch = soft_model(kind).train(), random_batch()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        scored = forward(model, batch, hidden=True, path=path)
        found.append((scored.logprobs_N.detach(), gradients(model, scored.logprobs_N, scored.last_CD)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert_close(found[1][1][name], gradient, **CLOSE)


@pytest.mark.parametrize("kind", ["prefix", "prefix projection"])
def test_f8_checkpointing_a_prefix_is_refused_with_the_reason(kind: str) -> None:
    model = soft_model(kind)
    with pytest.raises(CapabilityError, match="keys and values lie in the cache"):
        enable_checkpointing(model)
    model.get_base_model().activation_checkpointing_enable()  # by somebody else, later
    with pytest.raises(CapabilityError, match="activation checkpointing, which drops the cache"):
        forward(model.train(), random_batch())
    assert forward(model.eval(), random_batch()).logprobs_N.isfinite().all()


def test_f8_a_prefix_on_a_checkpointed_base_is_refused() -> None:
    base = tiny_model()
    base.activation_checkpointing_enable()
    with pytest.raises(CapabilityError, match="activation_checkpointing_disable"):
        attach(base, prefix(3))
    assert attach(base, prompt(3)) is not base


# -- F28: names --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_f28_an_adapter_of_any_name_computes_the_same(kind: str) -> None:
    batch = random_batch()
    named = soft_model(kind, name="tone of voice")
    assert torch.equal(forward(named, batch).logprobs_N, forward(soft_model(kind), batch).logprobs_N)
    with adapters_off(named):
        assert torch.equal(
            forward(named, batch, path="padded").logprobs_N,
            forward(tiny_model(), batch, path="padded").logprobs_N,
        )


@pytest.mark.parametrize("kind", BOTH)
def test_f28_two_adapters_are_told_apart(kind: str) -> None:
    model, batch = soft_model(kind), random_batch()
    first = forward(model, batch).logprobs_N
    model = attach(model, SOFT[kind](), name="second")
    second = forward(model, batch).logprobs_N
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".second." in name for name in trained)
    assert not torch.allclose(first, second, atol=1e-2)
    with adapters_active(model, ["default"]):
        assert torch.equal(forward(model, batch).logprobs_N, first)
    assert torch.equal(forward(model, batch).logprobs_N, second)


def test_a_window_shorter_than_pads_and_prompt_is_felt() -> None:
    """The batches above would not tell otherwise."""
    assert max(map(len, PROMPTS)) > WINDOW > COUNT
    assert all(token < VOCAB for row in PROMPTS for token in row)
