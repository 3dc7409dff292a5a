"""Alpaca and Dolly: an instruction, perhaps an input, and a response, under headings.

Source: Taori et al. 2023, the two published preambles; Conover et al. 2023 for Dolly's columns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, final

from ftlib.data.instructions.layout import Instructed
from ftlib.data.instructions.task import read_task
from ftlib.data.segments import Row, Segment
from ftlib.errors import ConfigError

__all__ = ["Alpaca", "alpaca", "dolly"]

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_CITATION = re.compile(r"\[\d+\]")


@final
@dataclass(frozen=True)
class Alpaca:
    """See `alpaca` and `dolly`."""

    joiner: str = "\n"
    citations: Literal["keep", "remove"] = "keep"

    def __post_init__(self) -> None:
        if self.citations not in ("keep", "remove"):
            raise ConfigError(f"dolly: expected citations as 'keep' or 'remove', got {self.citations!r}.")

    def __call__(self, row: Row) -> Instructed:
        """Preamble, earlier exchanges, instruction, input, and the heading of the response."""
        task = read_task(row)
        if self.citations == "remove" and task.input is not None:
            task = replace(task, input=_CITATION.sub("", task.input))
        preamble = PREAMBLE if task.input is None else PREAMBLE_WITH_INPUT
        text = f"{task.system or preamble}\n\n"
        for asked, answered in task.history:
            text += f"{_asked(asked, None)}{answered}\n\n"
        text += _asked(task.instruction, task.input)
        return Instructed((Segment(text, "prompt"),), task.output, task.turns(self.joiner))

    def row(self, prompt: str) -> Row:
        """A bare prompt is an instruction without input."""
        return {"instruction": prompt}


def alpaca(*, joiner: str = "\n") -> Alpaca:
    """Rows with `instruction`, `output` and perhaps `input`, `system` and `history`.

    A blank input is no input, and each case has its published preamble. A `system` text stands in place
    of the preamble; `history` is a list of (instruction, response).

    Args:
        joiner: between instruction and input, where they become one message.
    """
    return Alpaca(joiner)


def dolly(*, citations: Literal["keep", "remove"] = "keep", joiner: str = "\n") -> Alpaca:
    """Rows with `instruction`, `response` and perhaps `context`, which is the input. `category` is not read.

    Args:
        citations: ``"remove"`` takes bracketed numbers such as ``[12]``, left over from Wikipedia, out of
            the context.
        joiner: see `alpaca`.
    """
    return Alpaca(joiner, citations)


def _asked(instruction: str, given: str | None) -> str:
    shown = "" if given is None else f"### Input:\n{given}\n\n"
    return f"### Instruction:\n{instruction}\n\n{shown}### Response:\n"
