"""Encoded examples as columns, with what became of each beside it, so that workers and caches can report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Features, List, Value

from ftlib.data.audit import digest
from ftlib.data.examples import Example
from ftlib.data.problems import gathered
from ftlib.data.report import Report
from ftlib.errors import DataError

__all__ = ["COLUMNS", "STATUS", "as_columns", "count", "features", "raise_problems"]

COLUMNS = Features(
    {
        "prefix_ids": List(Value("int32")),
        "prefix_weights": List(Value("float32")),
        "continuation_ids": List(List(Value("int32"))),
        "continuation_weights": List(List(Value("float32"))),
        "length": Value("int32"),
        "source": Value("string"),
    }
)
STATUS = Features(
    {
        "problem": Value("string"),
        "dropped": Value("string"),
        "notes": List(Value("string")),
        "trained": Value("int32"),
        "answers": Value("int32"),
        "pairs": Value("int32"),
        "first": Value("bool"),
        "digest": Value("int64"),
    }
)


def features(extras: Sequence[str]) -> Features:
    """The columns of encoded data with one float per continuation under each name of `extras`."""
    return Features({**COLUMNS, **{name: List(Value("float32")) for name in extras}})


def as_columns(example: Example, extras: Sequence[str]) -> dict[str, Any]:
    """One example under the names of `features(extras)` and `STATUS`."""
    problem = example.problem
    return {
        "prefix_ids": example.prefix[0],
        "prefix_weights": example.prefix[1],
        "continuation_ids": [ids for ids, _ in example.continuations],
        "continuation_weights": [weights for _, weights in example.continuations],
        "length": example.length,
        "source": example.source,
        **{name: list(example.extras.get(name, ())) for name in extras},
        "problem": None if problem is None else json.dumps({"message": problem.message, **problem.fields}),
        "dropped": example.dropped,
        "notes": list(example.notes),
        "trained": example.trained,
        "answers": len(example.continuations) if example.pairs else 0,
        "pairs": example.pairs,
        "first": example.first,
        "digest": digest(example),
    }


def count(report: Report, status: Iterable[Mapping[str, Any]]) -> None:
    """Add encoded examples to a report.

    Raises:
        DataError: the problems among them, all at once.
    """
    problems = []
    for example in status:
        if example["problem"] is not None:
            problems.append(DataError(**json.loads(example["problem"])))
            continue
        report.add(
            length=example["length"],
            trained=example["trained"],
            answers=example["answers"],
            pairs=example["pairs"],
            dropped=example["dropped"],
            notes=example["notes"],
            first=example["first"],
        )
    raise_problems(problems)
    report.check()


def raise_problems(problems: Iterable[DataError | None]) -> None:
    """Raise all of these as one.

    Raises:
        DataError: there is at least one.
    """
    found = [problem for problem in problems if problem is not None]
    if found:
        raise gathered(found)
