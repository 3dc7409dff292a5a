"""The split of classification data, and what must not stand on both of its sides."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.checks.labels import check_positive_class
from ftlib.data.preparation.checks.repeats import near_clusters
from ftlib.data.preparation.sides import Sides, divide
from ftlib.data.preparation.words import counted
from ftlib.errors import DataError

__all__ = ["LEAKAGE", "SPLIT"]


def _split(context: Context) -> Iterator[Finding]:
    check_positive_class(context)
    if context.task != "classification" or len(context.intake.parts) > 1:
        settings = context.settings
        asked = [name for name in ("validation", "group", "seed") if getattr(settings, name) is not None]
        asked += ["split_method"] if settings.split_method != "stratified" else []
        if asked:
            yield Finding(
                f"no split, so {', '.join(asked)} has no effect: only classification data in one file are "
                "split",
                data={"unused": asked},
                doubt=True,
            )
        return
    try:
        sides = divide(context.table, context.intake, context.scan, context.settings)
    except DataError as error:
        yield Finding(f"no split: {error.message}", data={"withheld": True}, doubt=True)
        return
    sizes = f"{counted(len(sides.train), 'row')} for training, {len(sides.valid):,} for validation"
    yield Finding(
        sizes,
        count=len(context.table),
        data={"method": sides.method, "train": len(sides.train), "valid": len(sides.valid)},
        fix=Fix("on", f"Split into {sizes}", {"method": sides.method}, known={"sides": sides}),
    )


def _leakage(context: Context) -> Iterator[Finding]:
    sides: Sides | None = context.sides
    if sides is not None and sides.shared_prompts:
        yield Finding(
            f"{counted(sides.shared_prompts, 'prompt')} on both sides of the split",
            count=sides.shared_prompts,
            data={"shared_prompts": sides.shared_prompts},
        )
    starts = [start for start, _ in context.intake.spool.starts()]
    if len(starts) > 1:
        files = [np.searchsorted(starts, cluster, side="right") for cluster in near_clusters(context)]
        clusters = [
            cluster
            for cluster, file in zip(near_clusters(context), files, strict=True)
            if len(np.unique(file)) > 1
        ]
        if clusters:
            yield Finding(
                f"{counted(len(clusters), 'cluster')} of near-duplicates over several files",
                clusters=clusters,
            )


SPLIT = Check("split", "classification", _split, "write training and validation rows to two files", "on")
LEAKAGE = Check(
    "leakage",
    "a prompt on both sides of the split, or near-duplicates in several of the given files",
    _leakage,
    added=True,
)
