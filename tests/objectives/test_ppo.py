"""PPO's loss of a batch: its terms and their denominators, gradients, any split, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.batches import LossOutput, PackedBatch
from ftlib.data import collate
from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import kl_estimate
from ftlib.models import Scored, Scorer
from ftlib.models.heads import new_value_head
from ftlib.objectives import PPO, SFT
from ftlib.objectives.rollout_rows import Example, examples, ptx_row
from tests.models_zoo import EOS, tiny_model
from tests.objectives.rollouts import drawn, rollout
from tests.trainers.tiny import rows as text_rows

PLAIN = {"whiten_advantages": False, "missing_stop_penalty": 0.0, "lam": 0.0}
REFUSED = [
    *(("reward", kind) for kind in ("k2", "abs", "k3", "k3_plus", "exact")),
    *(("loss", kind) for kind in ("k1", "k3", "abs", "exact")),
]


# -- by hand: given what the model says -------------------------------------------------------------------


def batch_of(objective: PPO, *rollouts: Any, beta: float = 0.0) -> PackedBatch:
    return collate(objective.prepare(rollouts, beta=beta).rows)


def says(logprobs: Sequence[float], values: Sequence[float] | None = None) -> Scored:
    return Scored(
        torch.tensor(logprobs).requires_grad_(),
        values_N=None if values is None else torch.tensor(values).requires_grad_(),
    )


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def mean_of(objective: PPO, output: LossOutput, batch: PackedBatch, term: str) -> float:
    return number(output.terms[term].sum / objective.counts(batch)[term])


def test_each_token_weighs_the_same_whatever_its_row():
    """P1: losses of +1 on ten tokens and -1 on two are .6667; a mean of means would be 0."""
    objective = PPO(critic=False, **PLAIN)
    rows = [
        rollout(old=[-1.0] * 10, score=None, token_rewards=[-1.0] * 10),
        rollout(old=[-1.0] * 2, score=None, token_rewards=[1.0] * 2),
    ]
    parts = [batch_of(objective, row) for row in rows]
    counts = {"policy": torch.stack([objective.counts(part)["policy"] for part in parts]).sum()}
    outputs = [objective.of(says([-1.0] * n), part) for n, part in zip((10, 2), parts, strict=True)]
    assert_close(torch.stack([output.loss(counts) for output in outputs]).sum(), torch.tensor(2 / 3))


def test_the_value_term_is_clipped_halved_and_weighted():
    """P1: V_old = .2, V = .9, R = 1, clip .2 cost .18."""
    objective = PPO(value_coef=0.5, value_clip=0.2, **PLAIN)
    row = rollout(old=[-1.0], values=[0.2], score=1.0)
    batch = batch_of(objective, row)
    output = objective.of(says([-1.0], [0.9]), batch)
    assert mean_of(objective, output, batch, "value") == pytest.approx(0.5 * 0.18)


def test_a_ratio_outside_of_the_clip_earns_and_learns_nothing_more():
    """P1: A = 1, rho = 1.5 costs -1.2, and its gradient is zero."""
    objective = PPO(critic=False, **PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0], score=1.0))
    scored = says([-1.0 + float(torch.tensor(1.5).log())])
    output = objective.of(scored, batch)
    assert number(output.terms["policy"].sum) == pytest.approx(-1.2)
    output.terms["policy"].sum.backward()
    assert scored.logprobs_N.grad.tolist() == [0.0]
    assert float(output.metrics["clip_fraction"].value) == 1.0
    assert float(output.metrics["ratio_deviation"].value) == pytest.approx(0.5)


def test_approx_kl_is_half_the_mean_squared_log_ratio():
    objective = PPO(critic=False, **PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0, -1.0], score=1.0))
    metrics = objective.of(says([-1.1, -0.7]), batch).metrics
    assert float(metrics["approx_kl"].value) == pytest.approx((0.01 + 0.09) / 4)


def test_importance_weights_multiply_the_policys_loss_alone():
    objective = PPO(**PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0, -1.0], score=1.0))
    weighted = replace(batch, token_extras={**batch.token_extras, "importance": torch.tensor([1.0, 0.25])})
    scored = says([-1.0, -1.0], [0.3, 0.4])
    ours, theirs = objective.of(scored, batch), objective.of(scored, weighted)
    assert number(theirs.terms["policy"].sum) == pytest.approx(0.25 * number(ours.terms["policy"].sum))
    assert torch.equal(theirs.terms["value"].sum, ours.terms["value"].sum)


@pytest.mark.parametrize(("kind", "gradient_of"), [("k2", "k2"), ("k3_plus", "k2")])
def test_a_penalty_in_the_loss_has_the_gradient_of_k2_times_the_ratio(kind, gradient_of):
    """The ratio is a constant factor, for tokens of an older policy."""
    objective = PPO(critic=False, kl_place="loss", kl_kind=kind, **PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0, -2.0], ref=[-1.5, -1.0]), beta=0.3)
    now = [-0.9, -2.2]
    scored = says(now)
    output = objective.of(scored, batch)
    assert float(batch.token_extras["advantages"].abs().sum()) == 0.0, "none of it is in the reward"
    output.terms["kl"].sum.backward()
    logprobs, ratio = (
        torch.tensor(now).requires_grad_(),
        (torch.tensor(now) - torch.tensor([-1.0, -2.0])).exp(),
    )
    kl = kl_estimate(logprobs, torch.tensor([-1.5, -1.0]), kind=gradient_of)
    (0.3 * ratio * kl).sum().backward()
    assert_close(scored.logprobs_N.grad, logprobs.grad)
    value = kl_estimate(torch.tensor(now), torch.tensor([-1.5, -1.0]), kind="k2" if kind == "k2" else "k3")
    assert_close(output.terms["kl"].sum.detach(), (0.3 * ratio * value).sum())


def test_entropy_is_a_bonus():
    objective = PPO(critic=False, entropy_coef=0.5, **PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0, -1.0]))
    output = objective.of(replace(says([-1.0, -1.0]), entropy_N=torch.tensor([0.4, 0.8])), batch)
    assert mean_of(objective, output, batch, "entropy") == pytest.approx(-0.5 * 0.6)


# -- on a model: gradients -----------------------------------------------------------------------------


def scorer(seed: int = 0) -> Scorer:
    """A tiny Llama with a value head that is not zero."""
    model = tiny_model("llama", seed=seed)
    head = new_value_head(model.config.hidden_size)
    nn.init.constant_(head.weight, 0.1)
    return Scorer(model, value_head=head)


def moved_rows(objective: PPO, *, beta: float = 0.1) -> list[Example]:
    """Five completions of three prompts with numbers of an older policy; some have holes."""
    prompts = ((5, 6), (5, 6), (7,), (7,), (8, 9, EOS, 4))
    made = []
    for seed, prompt in enumerate(prompts):
        length = 2 + seed
        generator = torch.Generator().manual_seed(seed)
        mask = [1, *(torch.rand(length - 2, generator=generator) < 0.7).tolist(), 1]
        ids = [*torch.randint(3, 97, (length - 1,), generator=generator).tolist(), EOS]
        made.append(rollout(**drawn(seed, length), prompt=prompt, ids=ids, mask=mask, score=seed / 3))
    return objective.prepare(made, beta=beta).rows


def stepped(
    objective: PPO, model: nn.Module, batches: Sequence[PackedBatch]
) -> tuple[float, dict[str, Tensor], Mapping[str, Tensor]]:
    """Loss, gradients and metrics' sums of one step of these micro-batches."""
    model.zero_grad()
    each = [objective.counts(batch) for batch in batches]
    counts = {name: torch.stack([count[name] for count in each]).sum() for name in each[0]}
    total, sums = 0.0, {}
    for batch in batches:
        output = objective(model, batch)
        loss = output.loss(counts)
        loss.backward()
        total += number(loss)
        for name, mean in output.metrics.items():
            sums[name] = sums.get(name, torch.zeros(())) + mean.sum
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return total, gradients, sums


def assert_same_step(found: Any, expected: Any) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    assert float(torch.stack([each.norm() for each in expected[1].values()]).norm()) > 0
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    for name, value in expected[2].items():
        assert_close(found[2][name], value, rtol=1e-5, atol=1e-6, msg=name)


LOSSES: dict[str, dict[str, Any]] = {
    "default": {},
    "asymmetric clip": {"clip": (0.1, 0.3)},
    "dual": {"dual": 2.0},
    "values not clipped": {"value_clip": None},
    "no critic": {"critic": False},
    "critic alone": {"policy": False, "trunk": False},
    "entropy": {"entropy_coef": 0.3},
    "penalty in the loss": {"kl_place": "loss"},
    "k2 in the loss": {"kl_place": "loss", "kl_kind": "k2"},
    "pre-training text": {"ptx_coef": 0.7},
    "temperature": {"temperature": 0.7},
}


def with_text(objective: PPO) -> list[Example]:
    text = [ptx_row(row) for row in text_rows(2)] if objective.ptx_coef else []
    return moved_rows(objective) + text


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cuts", [(1,), (3,), (1, 2, 3, 4)])
def test_any_split_has_the_same_loss_and_gradients(name, cuts):
    """P8: the micro-batches of a step, cut anywhere; text and rollouts may come apart."""
    objective, model = PPO(**LOSSES[name]), scorer()
    rows = with_text(objective)
    edges = (0, *cuts, len(rows))
    parts = [collate(rows[start:stop]) for start, stop in pairwise(edges)]
    whole = stepped(objective, model, [collate(rows)])
    assert_same_step(stepped(objective, model, parts), whole)


@pytest.mark.parametrize("name", LOSSES)
def test_order_does_not_matter(name):
    objective, model = PPO(**LOSSES[name]), scorer()
    rows = with_text(objective)
    assert_same_step(
        stepped(objective, model, [collate(rows[::-1])]), stepped(objective, model, [collate(rows)])
    )


@pytest.mark.parametrize("name", LOSSES)
def test_samples_of_a_prompt_as_one_group_are_those_rows(name):
    objective, model = PPO(**LOSSES[name]), scorer()
    rows = with_text(objective)
    groups = examples(rows, max_tokens=1000)
    assert len(groups) == len(rows) - 2
    assert sum(group["length"] for group in groups) == sum(row["length"] for row in rows) - 2 - 1
    assert_same_step(stepped(objective, model, [collate(groups)]), stepped(objective, model, [collate(rows)]))


def test_a_group_stays_within_a_micro_batch():
    rows = PPO().prepare([rollout(old=[-1.0] * 4) for _ in range(10)], beta=0.0).rows
    groups = examples(rows, max_tokens=11)  # a prompt of two, and two completions
    assert [len(group["continuation_ids"]) for group in groups] == [2] * 5
    assert [group["length"] for group in groups] == [10] * 5


def test_at_ratio_one_the_gradient_is_reinforces():
    """P6: -A grad(log pi) / N with the same advantages."""
    objective, model = PPO(critic=False), scorer()
    batch = collate(moved_rows(objective))
    now_N = model(batch).logprobs_N.detach()
    batch = replace(batch, token_extras={**batch.token_extras, "old_logprobs": now_N})
    _, found, sums = stepped(objective, model, [batch])
    assert float(sums["ratio_deviation"]) == float(sums["clip_fraction"]) == 0.0
    model.zero_grad()
    advantages_N = batch.token_extras["advantages"]
    (-(advantages_N * model(batch).logprobs_N).sum() / len(advantages_N)).backward()
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert_close(found[name], weight.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_the_value_loss_reaches_the_trunk_unless_told_otherwise():
    rows = moved_rows(PPO())
    for trunk in (True, False):
        model = scorer()
        _, gradients, _ = stepped(PPO(policy=False, trunk=trunk), model, [collate(rows)])
        assert ("model.model.layers.0.mlp.up_proj.weight" in gradients) is trunk
        assert float(gradients["value_head.weight"].norm()) > 0


def test_a_batch_in_which_nothing_counts_gives_a_finite_zero():
    objective, model = PPO(truncation="mask"), scorer()
    rows = objective.prepare([rollout(**drawn(0, 3), finished=False)], beta=0.1).rows
    loss, gradients, _ = stepped(objective, model, [collate(rows)])
    assert loss == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


# -- pre-training text ---------------------------------------------------------------------------------


def test_text_costs_its_token_mean_likelihood():
    """P24: coef x the loss of supervised training, beside an unchanged rest."""
    text = text_rows(3)
    objective, model = PPO(ptx_coef=0.7), scorer()
    rows = moved_rows(objective)
    batch = collate(rows + [ptx_row(row) for row in text])
    output, alone = objective(model, batch), PPO()(model, collate(rows))
    loss = SFT()(model, collate(text)).terms["nll"].value
    assert_close(output.terms["ptx"].sum / objective.counts(batch)["ptx"], 0.7 * loss)
    for name in ("policy", "value"):
        assert_close(output.terms[name].value, alone.terms[name].value)


def test_a_coefficient_of_zero_leaves_text_out():
    """P24."""
    model, rows = scorer(), moved_rows(PPO())
    with_it = stepped(PPO(), model, [collate(rows + [ptx_row(row) for row in text_rows(3)])])
    assert_same_step(with_it, stepped(PPO(), model, [collate(rows)]))


# -- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "kind"), REFUSED)
def test_an_estimator_that_does_not_regularise_where_it_stands_is_refused(place, kind):
    """P23. Exact KL in the loss would regularise, but takes whole distributions."""
    with pytest.raises(ConfigError, match=f"KL '{kind}' in the {place}"):
        PPO(kl_place=place, kl_kind=kind)


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.0},
        {"clip": (0.2, -0.1)},
        {"dual": 0.9},
        {"value_clip": 0.0},
        {"value_coef": -1.0},
        {"entropy_coef": float("nan")},
        {"ptx_coef": float("inf")},
        {"missing_stop_penalty": -1.0},
        {"temperature": 0.0},
        {"gamma": 1.1},
        {"lam": -0.1},
        {"lam_value": 2.0},
        {"truncation": "cut"},
        {"kl_place": "advantage"},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(options):
    [name] = options
    with pytest.raises(ConfigError, match=rf"^objectives\.PPO: {name}: expected"):
        PPO(**options)


def test_values_that_nobody_gave_are_asked_for():
    objective = PPO(**PLAIN)
    batch = batch_of(objective, rollout(old=[-1.0]))
    with pytest.raises(ShapeError, match="expected values in what was scored"):
        objective.of(says([-1.0]), batch)


def test_rows_of_another_kind_ride_along():
    """The extras of rollouts and of text have the same names, so that they fit into one batch."""
    assert set(ptx_row(text_rows(1)[0])) - {"source"} == set(moved_rows(PPO())[0]) - {"source"}


def test_an_objective_does_not_change_its_batch():
    objective, model = PPO(ptx_coef=0.1, entropy_coef=0.1, kl_place="loss"), scorer()
    batch = collate(with_text(objective))
    before = {name: value.clone() for name, value in (batch.extras | batch.token_extras).items()}
    objective(model, batch)
    for name, value in before.items():
        assert torch.equal((batch.extras | batch.token_extras)[name], value), name
