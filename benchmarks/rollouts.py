"""What is recorded of trainers that draw the completions they train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.recorder import IGNORED, Example, Recorder
from benchmarks.records import Run

__all__ = ["Drawn", "RolloutRecorder", "plain_scores", "recorded", "without_labels"]

Ids = Sequence[int]


@dataclass(frozen=True)
class Drawn:
    """One step's prompts, completions and the scores that its side gave them."""

    prompts: Sequence[Ids]
    completions: Sequence[Ids]
    scores: Sequence[float]


class RolloutRecorder(Recorder):
    """A recorder for trainers of which one tells of no step's begin: a step goes from end to end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.on_step_begin(*args, **kwargs)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, **kwargs)
        self.on_step_begin(*args, **kwargs)


def without_labels(prompt: Ids) -> Example:
    """A prompt as an example, for its hash."""
    return [(prompt, [IGNORED] * len(prompt))]


def recorded(
    run: Run, drawn: Sequence[Drawn], measures: Sequence[Mapping[str, float]], reward: nn.Module
) -> Run:
    """A run on prompts alone, with what was drawn after them.

    Args:
        measures: of each step, "score" among them.
        reward: the reward model, to check the side's scores with.
    """
    steps = []
    for step, made, told in zip(run.steps, drawn, measures, strict=True):
        tokens = sum(map(len, made.completions))
        plain = plain_scores(reward, made.prompts, made.completions)
        wrong = [abs(one - other) for one, other in zip(made.scores, plain, strict=True)]
        error = max(*wrong, abs(told["score"] - fmean(plain)))
        steps.append(
            replace(
                step,
                tokens=step.tokens + tokens,
                trained_tokens=tokens,
                measures={**told, "score_error": error},
            )
        )
    return replace(run, steps=steps)


@torch.no_grad()
def plain_scores(model: Any, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[float]:
    """By transformers alone, row by row: without padding the last token is scored."""
    model.config.pad_token_id = None
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    return [float(model(input_ids=torch.tensor([row]), use_cache=False).logits) for row in rows]
