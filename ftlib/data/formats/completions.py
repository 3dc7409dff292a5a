"""A prompt and its completion, under the names that different collections give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlib.data import cells
from ftlib.data.formats.rule import (
    Converted,
    Dropped,
    FormatOptions,
    Found,
    Slot,
    optional,
    side,
    slotted,
    text,
)
from ftlib.data.messages import is_message_list
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["FLAN", "INPUT_OUTPUT", "PROMPT_COMPLETION", "TASKS"]


def _completion(found: Found, options: FormatOptions) -> Converted:
    prompt, completion = found["prompt"], found["completion"]
    if is_message_list(prompt) or is_message_list(completion):
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError(
                "expected prompt and completion both as text or both as messages, got one of each.",
                column=found.columns["completion"],
            )
        turns = {slot: found.messages(slot, options) for slot in ("prompt", "completion")}
        return cells.with_tools(found.row, turns)
    return {"prompt": found.text("prompt", empty=True), "completion": found.text("completion")}


def _flan(found: Found, options: FormatOptions) -> Converted:
    if found["is_correct"] is False:
        return Dropped("is_correct is false")
    return _completion(found, options)


def _tasks(found: Found, options: FormatOptions) -> Converted:
    """One record per instance: the definition, a blank line, the input; the first output or all."""
    definition = found["definition"]
    if isinstance(definition, list):
        definition = "\n".join(cells.text(line, "Definition") for line in definition)
    asked = cells.text(definition, "Definition")
    if not isinstance(found["instances"], list) or not found["instances"]:
        raise DataError(
            f"expected a list of instances, got {describe(found['instances'])}.", column="Instances"
        )
    records = []
    for k, instance in enumerate(found["instances"]):
        column = f"Instances[{k}]"
        if not isinstance(instance, Mapping):
            raise DataError(f"expected an object, got {describe(instance)}.", column=column)
        outputs = instance.get("output")
        outputs = outputs if isinstance(outputs, list) and outputs else [outputs or None]
        given = cells.text(instance.get("input"), f"{column}.input", empty=True)
        for output in outputs if options.outputs == "all" else outputs[:1]:
            record: dict[str, Any] = {
                "prompt": f"{asked}\n\n{given}",
                "completion": cells.text(output, f"{column}.output"),
            }
            records.append(record | ({"id": instance["id"]} if instance.get("id") is not None else {}))
    return records


PROMPT_COMPLETION = slotted(
    "prompt_completion",
    {"prompt": side("prompt"), "completion": side("completion", "generation")},
    _completion,
    keys="prompt + (completion | generation)",
    known_as="OpenAI legacy",
    columns=("prompt", "completion"),
    number=15,
)
FLAN = slotted(
    "flan",
    {
        "prompt": text("inputs", "inputs_pretokenized"),
        "completion": text("targets", "targets_pretokenized"),
        "is_correct": optional("is_correct"),
    },
    _flan,
    keys="inputs + targets",
    known_as="FLAN, P3",
    columns=("prompt", "completion"),
    number=16,
)
INPUT_OUTPUT = slotted(
    "input_output",
    {"prompt": text("input"), "completion": text("output")},
    _completion,
    keys="input + output",
    known_as="torchtune",
    columns=("prompt", "completion"),
    number=19,
)
TASKS = slotted(
    "tasks",
    {
        "definition": Slot(("Definition",), lambda value: isinstance(value, str | list)),
        "instances": Slot(("Instances",), lambda value: isinstance(value, list)),
    },
    _tasks,
    keys="Definition + Instances",
    known_as="Super-NaturalInstructions",
    columns=("prompt", "completion"),
    number=20,
    obeys=("outputs",),
)
