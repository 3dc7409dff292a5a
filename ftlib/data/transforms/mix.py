"""Several sources as one, drawn by weight. The drawing itself is `datasets.interleave_datasets`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from ftlib.checks import NATURAL, Wanted, check, number, one_of
from ftlib.data.transforms.report import Records, Step, Transformed, TransformReport
from ftlib.data.transforms.rows import fingerprint, refuse_others
from ftlib.errors import ConfigError, DataError

__all__ = ["mix"]

SOURCES = Wanted(
    "a dict of one source by name, or of several",
    lambda value: isinstance(value, Mapping) and bool(value),
)
WEIGHTS = Wanted(
    "a dict of one number per source",
    lambda value: isinstance(value, Mapping) and all(map(number().holds, value.values())),
)
Stop = Literal["first", "all", "once"]

_STRATEGIES = {
    "first": "first_exhausted",
    "all": "all_exhausted",
    "once": "all_exhausted_without_replacement",
}
_SOURCE, _PLACE = "_mixed_source", "_mixed_place"


def mix(
    sources: Mapping[str, Records],
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    stop: Stop = "first",
) -> Transformed:
    """Rows of several sources, each row drawn from a source with a probability in proportion to its weight.

    The rows of a source come in its order. The same seed gives the same rows, from data sets and from
    streams alike.

    Args:
        sources: by name, all data sets or all streams, with the same kind of records; a column that a source
            lacks is null in its rows.
        weights: one positive number per source; `None` weighs all alike.
        seed: any integer >= 0.
        stop: ``"first"`` ends when one source has no more rows, so no row comes twice. ``"all"`` ends when
            every source was read through; shorter ones start again, which the report counts as added.
            ``"once"`` takes every row once: sources that ended are left out of the drawing.

    Returns:
        Records and report, with the rows taken of each source. Of a stream, rows that were not read are not
        counted.

    Raises:
        ConfigError: weights that do not belong to the sources, a weight not above 0, an unknown `stop`, or
            data sets among streams.
        DataError: an empty source, or columns of one name and different types.
    """
    shares = _shares(sources, weights)
    check("mix", {"stop": (stop, one_of(Stop)), "seed": (seed, NATURAL)})
    step = Step("mix")
    options = {"probabilities": shares, "seed": seed, "stopping_strategy": _STRATEGIES[stop]}
    kinds = {isinstance(source, IterableDataset) for source in sources.values()}
    if kinds == {True}:
        return Transformed(_stream(sources, options, step), TransformReport((step,)))
    if kinds == {False}:
        return _data_set(sources, options, step)
    raise ConfigError(
        "mix: expected data sets or streams, got both. Turn data sets into streams: to_iterable_dataset()."
    )


def _shares(sources: Mapping[str, Records], weights: Mapping[str, float] | None) -> list[float]:
    check("mix", {"sources": (sources, SOURCES)})
    for name, source in sources.items():
        refuse_others(f"mix: {name}", source)
    check("mix", {"weights": (weights, WEIGHTS.or_none)})
    weights = dict.fromkeys(sources, 1.0) if weights is None else weights
    if set(weights) != set(sources):
        raise ConfigError(f"mix: expected a weight for each of {list(sources)}, got {list(weights)}.")
    wrong = {name: weight for name, weight in weights.items() if not 0.0 < weight < math.inf}
    if wrong:
        raise ConfigError(f"mix: expected weights above 0, got {wrong}. Leave out what should not be drawn.")
    total = math.fsum(weights.values())
    return [weights[name] / total for name in sources]


def _data_set(sources: Mapping[str, Any], options: dict[str, Any], step: Step) -> Transformed:
    empty = [name for name, source in sources.items() if not len(source)]
    if empty:
        raise DataError(f"mix: expected rows in every source, got none in {empty}.", code="empty_data")
    ends = np.cumsum([0, *map(len, sources.values())])
    # Drawn from row numbers: what is drawn can then be counted.
    numbers = [Dataset.from_dict({"row": np.arange(start, end)}) for start, end in pairwise(ends)]
    drawn = np.array(interleave_datasets(numbers, **options)["row"])
    for name, start, end in zip(sources, ends, ends[1:], strict=False):
        taken = drawn[(drawn >= start) & (drawn < end)]
        different = len(np.unique(taken))
        step.counts[f"from {name}"] = len(taken)
        step.dropped[f"{name} not reached"] = int(end - start) - different
        step.added[f"{name} repeated"] = len(taken) - different
    step.rows, step.kept = int(ends[-1]), len(drawn)
    step.dropped, step.added = +step.dropped, +step.added  # without zeros
    report = TransformReport((step,))
    report.check()
    whole = _concatenated(sources)
    parameters = [list(options.values()), [source._fingerprint for source in sources.values()]]
    return Transformed(whole.select(drawn, new_fingerprint=fingerprint("mix", whole, parameters)), report)


def _concatenated(sources: Mapping[str, Dataset]) -> Dataset:
    try:
        return concatenate_datasets(list(sources.values()))
    except ValueError as error:
        raise _unlike(sources, error) from error


def _stream(sources: Mapping[str, Any], options: dict[str, Any], step: Step) -> IterableDataset:
    """Rows carry their source and place through the drawing, and are counted behind it."""

    def marked(name: str, stream: IterableDataset) -> IterableDataset:
        def mark(row: dict[str, Any], place: int) -> dict[str, Any]:
            return {**row, _SOURCE: name, _PLACE: place}

        return stream.map(mark, with_indices=True)

    furthest: dict[str, int] = {}

    def count(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index == 0:
            step.restart()
            furthest.clear()
        name, place = row[_SOURCE], row[_PLACE]
        step.kept += 1
        step.counts[f"from {name}"] += 1
        if place > furthest.get(name, -1):
            furthest[name] = place
            step.rows += 1
        else:
            step.added[f"{name} repeated"] += 1
        return row

    try:
        drawn = interleave_datasets([marked(name, source) for name, source in sources.items()], **options)
    except ValueError as error:
        raise _unlike(sources, error) from error
    return drawn.map(count, with_indices=True, remove_columns=[_SOURCE, _PLACE])


def _unlike(sources: Mapping[str, Records], error: ValueError) -> DataError:
    return DataError(
        f"mix: expected columns of one name to have one type in {list(sources)}: {error} "
        "Bring the sources to one form first, for example with template.",
        code="bad_row",
    )
