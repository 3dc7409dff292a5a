"""A weighted sum of objectives is that sum: in loss, gradient, counts and metrics, from one forward."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ftlib.batches import LossOutput, Mean
from ftlib.errors import ConfigError
from ftlib.models import Scorer, forward
from ftlib.models.references import Snapshot
from ftlib.objectives import DPO, SFT, Needs, Reward, weighted
from tests.models_zoo import tiny_model
from tests.objectives.answers import Given, answers, batch_of, pair

SHARE = 0.1


def batch():
    return batch_of(pair(), answers(5, 4), answers(2, 6, 3))


def losses_and_gradients(objective, model, batch):
    model.zero_grad()
    loss = objective(model, batch).loss(objective.counts(batch))
    loss.backward()
    grads = {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    return loss.detach(), grads


class Alone:
    """An objective without `of`: the mean log-probability, from a forward of its own."""

    def __init__(self):
        self.calls = 0

    def counts(self, batch):
        return {"own": torch.tensor(float(len(batch.targets_N)))}

    def __call__(self, model, batch):
        self.calls += 1
        logprobs_N = forward(model, batch).logprobs_N
        return LossOutput({"own": Mean(logprobs_N.sum(), torch.tensor(float(len(logprobs_N))))})


class Reads:
    """An objective that shows which forward it was given."""

    def __init__(self, needs):
        self.needs, self.seen = needs, None

    def counts(self, batch):
        return {"reads": torch.tensor(1.0)}

    def of(self, scored, batch):
        self.seen = scored
        return LossOutput({"reads": Mean(0 * scored.logprobs_N.sum(), torch.tensor(1.0))})

    def __call__(self, model, batch):
        raise AssertionError("the forward is shared")


@pytest.mark.parametrize("reference", [None, Snapshot])
def test_dpo_with_a_share_of_sft_is_their_weighted_sum(reference):
    model = tiny_model("llama")
    dpo = DPO(reference(tiny_model("llama", seed=1)) if reference else None, beta=0.3)
    both, grads = losses_and_gradients(weighted({dpo: 1.0, SFT(): SHARE}), model, batch())
    (first, first_grads), (second, second_grads) = (
        losses_and_gradients(member, model, batch()) for member in (dpo, SFT())
    )
    assert_close(both, first + SHARE * second)
    assert grads.keys() == first_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, first_grads[name] + SHARE * second_grads[name], rtol=1e-4, atol=1e-6)


def test_each_term_keeps_its_own_denominator():
    objective = weighted({DPO(None): 1.0, SFT(): SHARE})
    counts = objective.counts(batch())
    assert {name: count.item() for name, count in counts.items()} == {
        "weighted_dpo": 3.0,  # groups
        "weighted_nll": 3.0 + 5.0 + 2.0,  # tokens of the best answers
    }
    output = objective(tiny_model("llama"), batch())
    assert list(output.terms) == list(counts)
    assert all(output.terms[name].count == count for name, count in counts.items())


def test_terms_hold_the_coefficient_and_metrics_the_plain_means():
    model = tiny_model("llama")
    output = weighted({DPO(None): 2.0, SFT(): SHARE})(model, batch())
    nll = SFT()(model, batch()).terms["nll"].value
    assert_close(output.metrics["nll"].value, nll.detach())
    assert_close(output.terms["weighted_nll"].value, SHARE * nll)
    assert {"accuracy", "margin", "dpo"} <= output.metrics.keys()
    assert not any(mean.sum.requires_grad for mean in output.metrics.values())


def test_one_forward_serves_all_members():
    model = Scorer(tiny_model("llama"))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    weighted({DPO(None): 1.0, DPO(None, loss="ipo"): 1.0, SFT(): SHARE})(model, batch())
    assert len(calls) == 1


def test_references_run_before_that_forward():
    calls = []
    model = Scorer(tiny_model("llama"))
    model.register_forward_hook(lambda *_: calls.append("policy"))

    class Watched(Given):
        def logprobs(self, batch):
            calls.append("reference")
            return super().logprobs(batch)

    weighted({Alone(): 1.0, SFT(): SHARE, DPO(Watched()): 1.0})(model, batch())
    assert calls == ["reference", "policy", "policy"]


def test_members_of_the_same_name_stay_apart():
    one, two = DPO(Given(), beta=0.1), DPO(Given(), beta=0.5)
    output = weighted({one: 1.0, two: 1.0})(model := tiny_model("llama"), batch())
    assert list(output.terms) == ["weighted_dpo", "weighted_dpo_2"]
    for member, suffix in ((one, ""), (two, "_2")):
        alone = member(model, batch())
        assert_close(output.terms[f"weighted_dpo{suffix}"].value, alone.terms["dpo"].value)
        assert_close(output.metrics[f"margin{suffix}"].value, alone.metrics["margin"].value)
    assert list(weighted({one: 1.0, two: 1.0}).counts(batch())) == list(output.terms)


def test_a_member_without_of_is_called_as_it_is():
    model, alone = tiny_model("llama"), Alone()
    output = weighted({alone: 2.0, SFT(): 1.0})(model, batch())
    assert alone.calls == 1
    assert_close(output.terms["weighted_own"].value, 2 * alone(model, batch()).terms["own"].value)
    assert list(output.terms) == ["weighted_own", "weighted_nll"]


def test_the_shared_forward_gives_what_any_member_needs():
    readers = Reads(Needs(entropy=True)), Reads(Needs(hidden=True))
    weighted(dict.fromkeys(readers, 1.0))(tiny_model("llama"), batch())
    for reader in readers:
        assert reader.seen.entropy_N is not None
        assert reader.seen.last_CD is not None


def test_sums_of_sums_are_flat_in_value():
    model = tiny_model("llama")
    inner = weighted({DPO(None): 1.0, SFT(): 2.0})
    outer = weighted({inner: 0.5, SFT(): 1.0})
    assert_close(
        outer(model, batch()).loss(outer.counts(batch())),
        weighted({DPO(None): 0.5, SFT(): 2.0})(model, batch()).loss(
            weighted({DPO(None): 0.5, SFT(): 2.0}).counts(batch())
        ),
    )


def test_a_coefficient_of_zero_changes_no_gradient():
    model = tiny_model("llama")
    _, alone = losses_and_gradients(SFT(), model, batch())
    _, both = losses_and_gradients(weighted({SFT(): 1.0, DPO(None): 0.0}), model, batch())
    for name, grad in alone.items():
        assert_close(both[name], grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "at least one objective"),
        ({SFT(): math.nan}, "finite coefficient of SFT"),
        ({SFT(): math.inf}, "finite coefficient"),
        ({SFT: 1.0}, r"objectives such as SFT\(\), got <class"),
        ({"sft": 1.0}, "got 'sft'"),
        ({Reward(): 1.0, SFT(): 0.1}, "one head"),
    ],
)
def test_what_cannot_be_summed_is_refused(members, message):
    with pytest.raises(ConfigError, match=message):
        weighted(members)
