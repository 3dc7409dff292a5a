"""The DPO objective: derived numbers of hand-made log-probabilities, and a tiny model end to end."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from ftlib import losses
from ftlib.adapters import attach, lora
from ftlib.errors import ConfigError, ShapeError
from ftlib.models import Scorer, forward
from ftlib.models.references import AdapterOff, Cached, FrozenCopy, Snapshot, make_reference
from ftlib.objectives import DPO
from tests.models_zoo import tiny_model
from tests.objectives.answers import Given, answers, batch_of, pair, says

BETA = 0.1
# Log-ratios to the reference below: (-3) - (-4) = 1 for the chosen, (-7) - (-5) = -2 for the rejected.
POLICY = ([-1.0, -0.5, -1.5], [-3.0, -4.0])
REFERENCE = torch.tensor([-1.0, -1.0, -2.0, -2.0, -3.0])


def value(objective, scored=None, batch=None):
    scored = says(*POLICY) if scored is None else scored
    batch = batch_of(pair()) if batch is None else batch
    return objective.of(scored, batch).terms["dpo"].value.item()


def shown(objective, scored, batch):
    return {name: mean.value.item() for name, mean in objective.of(scored, batch).metrics.items()}


def log1pexp(x):
    return math.log1p(math.exp(x))


# -- derived numbers -----------------------------------------------------------------------------


def test_completions_are_summed_and_measured_against_the_reference():
    """h = 1 - (-2) = 3."""
    assert value(DPO(Given(REFERENCE), beta=BETA)) == pytest.approx(log1pexp(-0.3))


def test_without_a_reference_its_log_probabilities_are_zero():
    """h = -3 - (-7) = 4."""
    assert value(DPO(None, beta=BETA)) == pytest.approx(log1pexp(-0.4))


def test_loss_weights_scale_the_log_probabilities_of_tokens_on_both_sides():
    """Weights 2 and 1: policy -2 and -10, reference -4 and -5; h = 2 - (-5) = 7."""
    batch = replace(batch_of(answers(2, 2)), weights_N=torch.tensor([2.0, 1.0, 2.0, 1.0]))
    reference = Given(torch.tensor([-1.0, -2.0, -2.0, -1.0]))
    scored = says([-0.5, -1.0], [-3.0, -4.0])
    assert value(DPO(reference, beta=BETA), scored, batch) == pytest.approx(log1pexp(-0.7))


def test_ipo_takes_means_per_token():
    """1 / 3 - (-2 / 2) = 4 / 3 to a target of 5."""
    assert value(DPO(Given(REFERENCE), beta=BETA, loss="ipo")) == pytest.approx((4 / 3 - 5) ** 2)


def test_literal_ipo_takes_sums():
    objective = DPO(Given(REFERENCE), beta=BETA, loss="ipo", ipo_reduction="sum")
    assert value(objective) == pytest.approx((3 - 5) ** 2)


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("sigmoid", losses.dpo, {"label_smoothing": 0.1}),
        ("robust", losses.robust_dpo, {"label_smoothing": 0.1}),
        ("hinge", losses.hinge, {}),
        ("ipo", losses.ipo, {}),
        ("ipo", losses.ipo, {"ipo_reduction": "sum"}),
    ],
)
def test_a_name_is_its_function(name, function, options):
    by_name, by_function = (DPO(Given(REFERENCE), BETA, loss=loss, **options) for loss in (name, function))
    assert value(by_name) == value(by_function)
    summed = name != "ipo" or options == {"ipo_reduction": "sum"}
    lengths = torch.ones(2) if summed else torch.tensor([3.0, 2.0])
    sides = torch.tensor([[-3.0, -7.0], [-4.0, -5.0]]) / lengths
    expected = function(*sides.reshape(4, 1), beta=BETA, label_smoothing=options.get("label_smoothing", 0.0))
    assert value(by_name) == pytest.approx(expected.item())


def test_a_loss_of_the_callers_own_gets_sums_or_the_means_it_asks_for():
    def lead(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, *, beta, label_smoothing=0.0):
        return beta * (chosen_B - ref_chosen_B - rejected_B + ref_rejected_B) + label_smoothing

    assert value(DPO(Given(REFERENCE), 0.5, lead, 0.25)) == pytest.approx(0.5 * 3 + 0.25)
    lead.reduction = "mean"
    assert value(DPO(Given(REFERENCE), 0.5, lead)) == pytest.approx(0.5 * 4 / 3)


def test_a_ranking_costs_the_mean_of_its_pairs():
    """Log-probabilities -1, -2, -4 in the order 2, 1, 3: leads of -1 (second over first), 3 and 2."""
    scored, batch = says([-1.0], [-2.0], [-4.0]), batch_of(answers(1, 1, 1, rank=[2, 1, 3]))
    expected = sum(log1pexp(-lead) for lead in (-1, 3, 2)) / 3
    assert value(DPO(None, beta=1.0), scored, batch) == pytest.approx(expected)


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_of_one_pair():
    assert shown(DPO(Given(REFERENCE), beta=BETA), says(*POLICY), batch_of(pair())) == pytest.approx(
        {
            "reward_chosen": 0.1,
            "reward_rejected": -0.2,
            "margin": 0.3,
            "accuracy": 1.0,
            "logp_chosen": -3.0,
            "logp_rejected": -7.0,
            "kl": (1 - 2) / 2,
        }
    )


def test_rewards_are_those_of_the_ratio_the_loss_sees_and_sequences_stay_whole():
    metrics = shown(DPO(Given(REFERENCE), beta=BETA, loss="ipo"), says(*POLICY), batch_of(pair()))
    assert metrics == pytest.approx(
        {
            "reward_chosen": 0.1 / 3,
            "reward_rejected": -0.2 / 2,
            "margin": 0.1 / 3 + 0.2 / 2,
            "accuracy": 1.0,
            "logp_chosen": -3.0,
            "logp_rejected": -7.0,
            "kl": -0.5,
        }
    )


def test_a_policy_equal_to_its_reference_is_a_tie_at_log_2():
    scored = says(*POLICY)
    objective = DPO(Given(scored.logprobs_N.detach()))
    assert value(objective, scored) == pytest.approx(math.log(2))
    metrics = shown(objective, scored, batch_of(pair()))
    assert (metrics["accuracy"], metrics["margin"], metrics["kl"]) == (0.5, 0.0, 0.0)


def test_there_is_no_kl_without_a_reference():
    assert "kl" not in DPO(None).of(says(*POLICY), batch_of(pair())).metrics


def test_only_the_loss_carries_gradient():
    output = DPO(Given(REFERENCE)).of(says(*POLICY), batch_of(pair()))
    assert output.terms["dpo"].sum.requires_grad
    assert not any(mean.sum.requires_grad for mean in output.metrics.values())


# -- precision and extremes ------------------------------------------------------------------------


def test_small_leads_survive_the_sums_of_long_completions():
    """3,000 tokens of about -7 nats sum to -21,000, where float32 has steps of 0.002."""
    generator = torch.Generator().manual_seed(0)
    logprobs_N = -7 - torch.rand(6000, generator=generator)
    reference_N = logprobs_N.clone()
    reference_N[17] += 2**-12  # of the chosen: exact in float32 there
    difference = float((logprobs_N - reference_N)[17].double())
    output = DPO(Given(reference_N), beta=1.0).of(says(logprobs_N.tolist()), batch_of(answers(3000, 3000)))
    assert output.metrics["margin"].value.item() == pytest.approx(difference, rel=1e-3)


def test_a_completion_that_no_token_of_counts_for_is_finite():
    """All tokens of the rejected answer weigh nothing: its mean is 0, not 0 / 0."""
    batch = batch_of(pair())
    batch = replace(batch, weights_N=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    scored = says(*POLICY)
    loss = DPO(None, beta=BETA, loss="ipo").of(scored, batch).terms["dpo"].value
    loss.backward()
    assert loss.item() == pytest.approx((-1 - 5) ** 2)
    assert bool(scored.logprobs_N.grad.isfinite().all())


def test_pairs_without_loss_weights_add_nothing():
    batch = batch_of(pair())
    output = DPO(None).of(says(*POLICY), replace(batch, weights_N=torch.zeros(5)))
    assert output.terms["dpo"].sum == output.terms["dpo"].count == 0
    assert DPO(None).counts(replace(batch, weights_N=torch.zeros(5)))["dpo"] == 0


# -- the reference ---------------------------------------------------------------------------------


def test_a_prepared_batch_does_not_ask_the_reference_again():
    reference = Given(REFERENCE)
    objective = DPO(reference, beta=BETA)
    prepared = objective.prepare(batch_of(pair()))
    assert value(objective, batch=prepared) == value(objective)
    assert reference.asked == 2


def test_log_probabilities_of_the_reference_may_come_with_the_data():
    """Sums per continuation: -4 and -5, as above."""
    batch = batch_of(pair(reference_logprobs=[-4.0, -5.0]))
    assert value(DPO(None, beta=BETA), batch=batch) == pytest.approx(log1pexp(-0.3))
    assert shown(DPO(None, beta=BETA), says(*POLICY), batch)["kl"] == pytest.approx(-0.5)


def test_a_reference_given_outranks_the_data():
    batch = batch_of(pair(reference_logprobs=[100.0, -100.0]))
    prepared = DPO(Given(REFERENCE)).prepare(batch)
    assert_close(prepared.extras["reference_logprobs"].float(), torch.tensor([-4.0, -5.0]))


def test_no_gradient_reaches_the_reference():
    model, batch = tiny_model("llama"), batch_of(pair())

    class Live:
        def logprobs(self, batch):
            return forward(model, batch).logprobs_N

    assert not DPO(Live()).prepare(batch).extras["reference_logprobs"].requires_grad


def test_the_reference_runs_before_the_forward_of_the_policy():
    calls = []
    model, batch = Scorer(tiny_model("llama")), batch_of(pair())
    model.register_forward_hook(lambda *_: calls.append("policy"))

    class Watched(Given):
        def logprobs(self, batch):
            calls.append("reference")
            return super().logprobs(batch)

    DPO(Watched())(model, batch)
    assert calls == ["reference", "policy"]


def test_a_reference_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"\[5\], got \(2,\)"):
        DPO(Given(torch.zeros(2))).prepare(batch_of(pair()))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "kto"}, "expected a loss of .*'sigmoid'.* got 'kto'"),
        ({"beta": 0.0}, "beta: expected a finite number > 0"),
        ({"beta": math.nan, "loss": "ipo"}, "beta: expected a finite number > 0"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected a number >= 0 and < 0.5"),
        ({"label_smoothing": 0.1, "loss": "hinge"}, "hinge: expected label_smoothing=0"),
        ({"label_smoothing": 0.1, "loss": losses.ipo}, "ipo: expected label_smoothing=0"),
        ({"ipo_reduction": "sum"}, "ipo_reduction has no effect on loss='sigmoid'"),
        ({"ipo_reduction": "token", "loss": "ipo"}, "ipo_reduction"),
        ({"reference": "autp"}, "one of .*'auto'.*got 'autp'"),
        ({"beta": -1.0, "loss": partial(losses.dpo)}, "beta: expected a finite number > 0"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        DPO(**options)


def test_an_unknown_reduction_of_a_loss_is_refused_at_construction():
    def loss(*sides, beta, label_smoothing=0.0):
        return sides[0]

    loss.reduction = "median"
    with pytest.raises(ConfigError, match="median"):
        DPO(None, loss=loss)


def test_a_loss_that_reduces_is_refused():
    def reduced(*sides, beta, label_smoothing=0.0):
        return losses.dpo(*sides, beta=beta).mean()

    with pytest.raises(ShapeError, match=r"one loss per pair \[1\].*got \(\)\. Do not reduce"):
        value(DPO(None, loss=reduced))


def test_an_objective_is_a_value_whatever_its_reference():
    class Unhashable(Given):
        __hash__ = None

    reference = Unhashable()
    assert {DPO(reference): 1.0} == {DPO(reference): 1.0}
    assert DPO(reference) != DPO(reference, beta=0.2)


# -- a tiny model, end to end ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Snapshot, FrozenCopy.of])
def test_the_first_loss_is_log_2(kind):
    """Policy and reference are the same weights, changed in memory before the reference was taken."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    objective, batch = DPO(kind(model)), batch_of(pair(), answers(5, 4), answers(1, 6))
    output = objective(model, batch)
    assert output.loss(objective.counts(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    assert abs(output.metrics["margin"].value.item()) < 1e-5
    with torch.no_grad():
        model.lm_head.weight.mul_(1.3)
    assert abs(objective(model, batch).loss(objective.counts(batch)).item() - math.log(2)) > 1e-3


def test_a_fresh_adapter_is_measured_against_its_base_at_log_2():
    model = attach(tiny_model("llama"), lora(4))
    objective, batch = DPO(make_reference("auto", model)), batch_of(pair(), answers(5, 4))
    assert isinstance(objective.reference, AdapterOff)
    output = objective(model, batch)
    assert output.loss(objective.counts(batch)).item() == pytest.approx(math.log(2), abs=1e-6)
    output.terms["dpo"].sum.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_one_step_down_the_gradient_raises_the_margin():
    model, batch = tiny_model("llama"), batch_of(answers(5, 4))
    objective = DPO(Snapshot(model))
    before = objective(model, batch)
    before.loss(objective.counts(batch)).backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 0.01 * weight.grad
    assert objective(model, batch).metrics["margin"].value > before.metrics["margin"].value


# -- a reference that is still to be made ----------------------------------------------------------


def test_a_reference_by_name_is_made_of_the_weights_the_model_has_when_bound():
    model, batch = tiny_model("llama"), batch_of(pair(), answers(5, 4))
    bound = DPO(beta=BETA).bound(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    assert bound(model, batch).metrics["kl"].value.abs() > 1e-3
    assert_close(DPO(beta=BETA).bound(model)(model, batch).metrics["kl"].value, torch.tensor(0.0))


def test_unbound_it_is_refused_rather_than_left_out():
    with pytest.raises(ConfigError, match=r"Call objective\.bound\(model\)"):
        value(DPO(beta=BETA))


def test_a_reference_is_cached_unless_it_is_the_callers_own():
    model, own = tiny_model("llama"), Given(REFERENCE)
    assert isinstance(DPO().bound(model).reference, Cached)
    assert isinstance(DPO().bound(model, cache=False).reference, Snapshot)
    assert DPO(own).bound(model).reference is own
    assert DPO(None).bound(model).reference is None
