"""The one forward: what it takes, what it returns, and whose word on the path counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ftlib.errors import CapabilityError, ConfigError
from ftlib.losses import entropy
from ftlib.models import Scorer, forward
from tests.models_zoo import tiny_model
from tests.packed import random_batch

BATCH = random_batch()


def test_a_model_and_its_scorer_give_the_same() -> None:
    model = tiny_model()
    assert torch.equal(forward(model, BATCH).logprobs_N, forward(Scorer(model), BATCH).logprobs_N)


def test_a_wrapper_around_the_scorer_is_called_itself() -> None:
    """What accelerate returns holds the scorer as `.module`; its own forward has to run."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args: object, **options: object) -> object:
            self.calls += 1
            return self.module(*args, **options)

    model = tiny_model()
    wrapper = Wrapper(Scorer(model))
    assert torch.equal(forward(wrapper, BATCH).logprobs_N, forward(model, BATCH).logprobs_N)
    assert wrapper.calls == 1


def test_entropy_and_states_come_only_where_asked_for() -> None:
    scored = forward(tiny_model(), BATCH)
    assert scored.entropy_N is None
    assert scored.last_CD is None


@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_entropy_is_that_of_the_rows_logits(path: str) -> None:
    """Row 0 of plain text, seen alone: the entropy of the model's own first prediction."""
    model, batch = tiny_model(), random_batch([(0, (5,))])
    with torch.no_grad():
        own_TV = model(input_ids=batch.ids_T[None]).logits[0]
        scored = forward(model, batch, entropy=True, temperature=0.5, path=path)  # type: ignore[arg-type]
    assert_close(scored.entropy_N, entropy(own_TV[:-1] / 0.5), rtol=1e-5, atol=1e-5)


def test_the_scorers_path_is_used() -> None:
    model, sizes = tiny_model(), []
    forward(model, BATCH)
    model.model.register_forward_hook(lambda *call: sizes.append(call[-1].last_hidden_state.shape[0]))
    Scorer(model, path="padded")(BATCH)
    Scorer(model, path="grouped")(BATCH)
    assert sizes == [BATCH.continuations, 1]


def test_a_path_that_would_be_ignored_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="got 'flat'"):
        forward(model, BATCH, path="flat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keep its own path"):
        forward(Scorer(model), BATCH, path="padded")


def test_nothing_but_a_language_model_is_taken() -> None:
    with pytest.raises(CapabilityError, match="expected a causal language model of transformers"):
        forward(nn.Linear(2, 2), BATCH)


def test_a_head_of_the_other_kind_is_refused_by_what_to_load() -> None:
    language, reward = tiny_model(), tiny_model(auto=AutoModelForSequenceClassification, num_labels=1)
    with pytest.raises(CapabilityError, match=r"got a language model .* task='reward'"):
        forward(language, BATCH, scores=True)
    with pytest.raises(CapabilityError, match=r"expected scores=True .* come from ftlib.load\(name\)"):
        forward(reward, BATCH)


@pytest.mark.parametrize("options", [{"entropy": True}, {"temperature": 0.5}])
def test_options_of_log_probabilities_are_refused_where_there_are_none(options: dict[str, Any]) -> None:
    reward = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1)
    with pytest.raises(ConfigError, match="no effect on scores and values"):
        forward(reward, BATCH, scores=True, **options)


def test_states_come_beside_scores_where_asked_for() -> None:
    """The head is one matrix, so the states give the scores."""
    reward = tiny_model(auto=AutoModelForSequenceClassification, num_labels=3)
    scored = forward(reward, BATCH, scores=True, hidden=True)
    assert scored.last_CD is not None
    assert_close(scored.last_CD @ reward.score.weight.t(), scored.scores_CK)
    assert forward(reward, BATCH, scores=True).last_CD is None


@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_training_after_inference_mode_works(path: str) -> None:
    model = tiny_model()
    with torch.inference_mode():
        expected_N = forward(model, BATCH, path=path).logprobs_N.clone()  # type: ignore[arg-type]
    logprobs_N = forward(model, BATCH, path=path).logprobs_N  # type: ignore[arg-type]
    logprobs_N.sum().backward()
    assert_close(logprobs_N.detach(), torch.tensor(expected_N.tolist()))
