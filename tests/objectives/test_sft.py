"""The SFT objective sums and counts: numbers derived by hand, and any split adding up to the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ftlib.batches import Group
from ftlib.data import collate
from ftlib.models import forward
from ftlib.objectives import SFT
from tests.models_zoo import VOCAB, tiny_model
from tests.objectives.answers import answers, batch_of, pair, says
from tests.trainers.tiny import rows

EXAMPLES = rows(6)


def uniform_model():
    """Equal logits for every token: each costs log 97."""
    model = tiny_model("llama")
    torch.nn.init.ones_(model.lm_head.weight)
    return model


def two_tokens() -> Group:
    """A prompt of one token, and two tokens that weigh 1 and 0.5."""
    return Group(torch.tensor([5]), torch.zeros(1), (torch.tensor([6, 7]),), (torch.tensor([1.0, 0.5]),))


def test_a_uniform_model_costs_log_of_the_vocabulary_per_unit_of_weight():
    output = SFT()(uniform_model(), collate([two_tokens()]))
    assert_close(output.terms["nll"].sum, torch.tensor(1.5 * math.log(VOCAB)))
    assert_close(output.terms["nll"].count, torch.tensor(1.5))
    assert_close(output.loss({"nll": 1.5}), torch.tensor(math.log(VOCAB)))


def test_the_count_is_known_before_the_forward():
    batch = collate(EXAMPLES)
    assert torch.equal(SFT().counts(batch)["nll"], SFT()(tiny_model("llama"), batch).terms["nll"].count)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_any_split_has_the_same_sum_and_count(cut):
    model = tiny_model("llama")
    whole, left, right = (
        SFT()(model, collate(part)).terms["nll"] for part in (EXAMPLES, EXAMPLES[:cut], EXAMPLES[cut:])
    )
    assert_close((left + right).sum, whole.sum, rtol=1e-5, atol=0)
    assert_close((left + right).count, whole.count)


def test_a_batch_of_zero_weights_is_a_finite_zero_with_a_zero_gradient():
    batch = collate(EXAMPLES)
    batch = replace(batch, weights_N=torch.zeros_like(batch.weights_N))
    model = tiny_model("llama")
    loss = SFT()(model, batch).loss({"nll": 10.0})
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_only_the_sum_carries_gradient():
    mean = SFT()(tiny_model("llama"), collate(EXAMPLES)).terms["nll"]
    assert mean.sum.requires_grad
    assert not mean.count.requires_grad


def test_an_objective_is_a_value():
    assert SFT() == SFT()
    with pytest.raises(AttributeError):
        SFT().loss = None


# -- groups of several continuations -------------------------------------------------------------


def test_of_a_pair_the_chosen_answer_alone_is_trained():
    """Its three tokens, of which a uniform model makes log 97 each."""
    batch = batch_of(pair(), answers(2, 5, 4))
    output = SFT()(uniform_model(), batch)
    assert_close(output.terms["nll"].sum, torch.tensor((3 + 2) * math.log(VOCAB)))
    assert output.terms["nll"].count == SFT().counts(batch)["nll"] == 3 + 2


def test_of_ranked_answers_the_first_among_the_best_is_trained():
    scored = says([-1.0], [-2.0] * 2, [-4.0] * 3)
    term = SFT().of(scored, batch_of(answers(1, 2, 3, rank=[2, 1, 1]))).terms["nll"]
    assert (term.sum.item(), term.count.item()) == (4.0, 2.0)
    term.sum.backward()
    assert scored.logprobs_N.grad.tolist() == [0.0, -1.0, -1.0, 0.0, 0.0, 0.0]


def test_beside_single_completions_a_pair_counts_as_its_chosen_answer():
    batch = batch_of(answers(4), pair(), answers(2))
    assert SFT().counts(batch)["nll"] == 4 + 3 + 2


def test_a_pair_trains_as_its_chosen_answer_alone():
    model = tiny_model("llama")
    of_pair, alone = (SFT()(model, batch_of(group)).terms["nll"] for group in (pair(), answers(3)))
    assert_close(of_pair.sum, alone.sum, rtol=1e-5, atol=0)
    assert of_pair.count == alone.count


def test_single_continuations_keep_their_weights_bit_for_bit():
    batch, model = collate(EXAMPLES), tiny_model("llama")
    logprobs_N = forward(model, batch).logprobs_N
    term = SFT()(model, batch).terms["nll"]
    assert torch.equal(term.sum, (batch.weights_N * -logprobs_N).sum())
    assert torch.equal(term.count, batch.weights_N.sum())
