"""Transforms one after the other, as one transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.transforms.report import Step, Transformed, TransformReport
from ftlib.errors import ConfigError

__all__ = ["Pipeline", "pipeline"]

Transform = Callable[[Any], Transformed]


@final
@dataclass(frozen=True)
class Pipeline:
    """See `pipeline`."""

    transforms: tuple[Transform, ...]

    def __call__(self, records: Any) -> Transformed:
        """What the last transform makes, with the steps of all."""
        steps: tuple[Step, ...] = ()
        for transform in self.transforms:
            made = transform(records)
            if not isinstance(made, Transformed):
                raise ConfigError(
                    f"pipeline: expected each transform to return Transformed(records, report), got "
                    f"{type(made).__name__} from {transform!r:.80}. Split what the pipeline returns."
                )
            records, steps = made.records, steps + made.report.steps
        return Transformed(records, TransformReport(steps))


def pipeline(*transforms: Transform) -> Pipeline:
    """One transform that applies these in order; `functools.partial` fixes their options.

    Example:
        >>> from functools import partial
        >>> from datasets import Dataset
        >>> from ftlib.data.transforms import deduplicate, filter
        >>> clean = pipeline(
        ...     partial(filter, keep=lambda row: len(row["text"]) > 2, reason="under three characters"),
        ...     deduplicate,
        ... )
        >>> records, report = clean(Dataset.from_dict({"text": ["a cat", "a", "a dog", "a cat"]}))
        >>> records["text"][:], report.kept
        (['a cat', 'a dog'], 2)

    Raises:
        ConfigError: no transforms.
    """
    if not transforms:
        raise ConfigError("pipeline: expected at least one transform, got none.")
    return Pipeline(transforms)
