"""Rows that a function of yours accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from datasets import Dataset, Features, Value

from ftlib.data.environment import environment_kept
from ftlib.data.fingerprint import identity
from ftlib.data.transforms.report import Records, Step, Transformed
from ftlib.data.transforms.rows import Row, fingerprint, judged, refuse_others, row_name, taken_out
from ftlib.errors import ConfigError

__all__ = ["filter"]


def filter(  # noqa: A001  the name users know
    records: Records, keep: Callable[[Row], bool], *, reason: str, num_proc: int | None = None
) -> Transformed:
    """Records that `keep` accepts; the others are counted under `reason`.

    Args:
        records: records or a stream of them.
        keep: a row, nested null keys left out, to whether it stays; it depends on the row alone.
        reason: why the others go, in words, for the report.
        num_proc: worker processes, for a data set; the result does not depend on it.

    Raises:
        ConfigError: an empty reason, or worker processes for a stream.
    """
    refuse_others("filter", records)
    if not reason.strip():
        raise ConfigError("filter: expected a reason in words, got an empty one.")
    step = Step("filter")
    accepts = _Accepts(keep)
    if isinstance(records, Dataset) and num_proc is not None:
        with environment_kept():
            accepted = records.with_format(None).map(
                accepts,
                batched=True,
                num_proc=num_proc,
                remove_columns=records.column_names,
                features=Features({"accepted": Value("bool")}),
                new_fingerprint=fingerprint("accepted", records, identity(keep)),
                keep_in_memory=True,
            )["accepted"]
        answers = list(accepted)
    elif num_proc is not None:
        raise ConfigError(
            "filter: num_proc has no effect on a stream, which is read by its reader. Leave it out."
        )
    else:
        answers = None

    def verdict(row: Row, index: int) -> str | None:
        if accepts.one(row) if answers is None else answers[index]:
            return None
        step.show(reason, row_name(row, index))
        return reason

    return judged(records, verdict, step, (identity(keep), reason))


@final
@dataclass(frozen=True)
class _Accepts:
    """A batch of columns to whether each row stays; what `datasets.map` runs."""

    keep: Callable[[Row], bool]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[bool]]:
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        return {"accepted": [self.one(taken_out(row)) for row in rows]}

    def one(self, row: Row) -> bool:
        return bool(self.keep(row))
