"""A logged row is the mean over its steps, weighted by what they counted."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ftlib.batches import Mean
from ftlib.engine.engine import StepResult
from ftlib.engine.window import LogWindow, step_row


def result(**terms: tuple[float, float]) -> StepResult:
    means = {name: Mean(torch.tensor(total), torch.tensor(count)) for name, (total, count) in terms.items()}
    return StepResult(means, {}, grad_norm=2.0, tokens=10, learning_rate=0.1)


def test_a_row_is_no_mean_of_means():
    """Losses 1 over 1 token and 4 over 3 tokens: (1 + 12) / 4, not (1 + 4) / 2."""
    window = LogWindow()
    window.add(result(nll=(1.0, 1.0)))
    window.add(result(nll=(12.0, 3.0)))
    assert window.row() == {"loss": 13 / 4, "grad_norm": 2.0, "learning_rate": 0.1}
    assert window.tokens == 20


def test_several_terms_are_shown_and_add_up_to_the_loss():
    row = step_row(result(policy=(2.0, 1.0), value=(3.0, 2.0)))
    assert (row["loss"], row["loss_policy"], row["loss_value"]) == (3.5, 2.0, 1.5)


def test_a_term_that_counted_nothing_has_no_mean():
    assert math.isnan(step_row(result(nll=(0.0, 0.0)))["loss"])


def test_a_window_goes_on_from_its_state():
    window = LogWindow()
    window.add(result(nll=(0.1, 1.0)))
    again = LogWindow.of(json.loads(json.dumps(window.state())))
    for each in (window, again):
        each.add(result(nll=(0.2, 2.0)))
    assert again.row() == window.row() == pytest.approx({"loss": 0.1, "grad_norm": 2.0, "learning_rate": 0.1})
