"""Super-NaturalInstructions: a definition, a few solved examples, then the instance.

Source: Wang et al. 2022, the published layout, less the full stops that it adds to the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.instructions.choice import draw, row_id
from ftlib.data.instructions.layout import Instructed
from ftlib.data.instructions.task import column, string
from ftlib.data.segments import Row, Segment
from ftlib.errors import ConfigError, DataError

__all__ = ["SuperNaturalInstructions", "instances", "super_natural_instructions"]


@final
@dataclass(frozen=True)
class SuperNaturalInstructions:
    """See `super_natural_instructions`."""

    examples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ConfigError(f"super_natural_instructions: expected examples >= 0, got {self.examples}.")

    def __call__(self, row: Row) -> Instructed:
        """Definition, examples, instance; one of the instance's outputs as the target."""
        instance = _instance(row)
        given = string(instance, "input", "inputs")
        if given is None:
            raise DataError(
                f"expected an input, found {sorted(instance)}.", code="missing_column", column="input"
            )
        text = f"Definition: {_definition(row)}\n\n"
        for number, example in enumerate(_positive(row)[: self.examples], start=1):
            text += f"Positive Example {number} -\nInput: {example['input']}\nOutput: {example['output']}\n\n"
        text += f"Now complete the following example -\nInput: {given}\nOutput:"
        outputs = _outputs(instance)
        key = row_id(instance, ("input", "inputs"))
        completion = f" {outputs[draw(self.seed, key) % len(outputs)]}" if outputs else None
        return Instructed((Segment(text, "prompt"),), completion, ({"role": "user", "content": text},))

    def row(self, prompt: str) -> Row:
        """A bare prompt names no task."""
        raise DataError(f"expected a row with Definition and input, got the bare prompt {prompt!r:.80}.")


def super_natural_instructions(*, examples: int = 2, seed: int = 0) -> SuperNaturalInstructions:
    """Rows with `Definition`, `Positive Examples`, and one instance: `input` and `output`, or `Instances`.

    Args:
        examples: positive examples shown, the first ones of the task; as many as there are, if fewer.
        seed: of the choice among several outputs.
    """
    return SuperNaturalInstructions(examples, seed)


def instances(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A task file as rows: one per instance, each with the definition and the positive examples.

    Example:
        >>> task = {"Definition": ["Negate."], "Positive Examples": [], "Instances": [
        ...     {"id": "n-1", "input": "yes", "output": ["no"]}]}
        >>> instances(task)
        [{'Definition': ['Negate.'], 'Positive Examples': [], 'id': 'n-1', 'input': 'yes', 'output': ['no']}]
    """
    shared = {name: value for name, value in task.items() if name in ("Definition", "Positive Examples")}
    return [{**shared, **instance} for instance in task["Instances"]]


def _instance(row: Row) -> Row:
    found = column(row, "instances", "instance")
    if isinstance(found, Mapping):
        return found
    if found is None:
        return row
    if not isinstance(found, Sequence) or len(found) != 1 or not isinstance(found[0], Mapping):
        raise DataError(
            f"expected one instance per row, got {len(found)}. Make rows of a task file: "
            "ftlib.data.instructions.instances(task).",
            column="Instances",
        )
    return found[0]


def _definition(row: Row) -> str:
    found = column(row, "definition")
    text = found[0] if isinstance(found, Sequence) and not isinstance(found, str) and found else found
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"expected a definition, found {sorted(row)}.", code="missing_column", column="Definition"
        )
    return text.strip()


def _positive(row: Row) -> list[Mapping[str, Any]]:
    found = column(row, "positive examples", "positive_examples") or []
    for example in found:
        if not isinstance(example, Mapping) or not {"input", "output"} <= set(example):
            raise DataError(
                f"expected examples with input and output, got {example!r:.80}.", column="Positive Examples"
            )
    return list(found)


def _outputs(instance: Row) -> list[str]:
    found = column(instance, "output", "outputs", "targets", "target")
    texts = [found] if isinstance(found, str) else list(found or [])
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"expected outputs as text, got {found!r:.80}.", column="output")
    return [text for text in texts if text.strip()]
