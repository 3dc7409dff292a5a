"""The scores that an evaluation computes on its way to the loss, row by row: one forward serves both.

The rows carry their numbers through micro-batches and ranks, which take them in another order.

Shapes: C continuations, K scores of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor, nn

from ftlib.batches import PackedBatch
from ftlib.engine.engine import Engine
from ftlib.errors import CapabilityError
from ftlib.models import Scored
from ftlib.trainers.trained import Examples

__all__ = ["SeenScores", "seen_scores"]

NUMBER = "evaluated_row"  # an extra of each continuation; float32, exact up to 16 million rows


@final
class SeenScores:
    """What the forwards of an evaluation gave for each of its rows.

    Args:
        engine: that evaluates.
        data: the encoded rows.
    """

    def __init__(self, engine: Engine, data: Examples) -> None:
        self._engine = engine
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.rows: list[Mapping[str, Any]] = [
            {**row, NUMBER: [float(number)] * len(row["continuation_ids"])} for number, row in enumerate(data)
        ]

    def keep(self, _scorer: nn.Module, given: tuple[PackedBatch, ...], scored: Scored) -> None:
        """A forward hook: the scores of this batch."""
        batch = given[0]
        if scored.scores_CK is not None and NUMBER in batch.extras:
            self._seen.append((batch.extras[NUMBER], scored.scores_CK.detach()))

    def by_row(self) -> list[list[list[float]]]:
        """Of each row its continuations' scores [C, K], of all ranks' rows on every one of them.

        Raises:
            CapabilityError: the objective left rows without a score.
        """
        own = [(numbers_C.tolist(), scores_CK.tolist()) for numbers_C, scores_CK in self._seen]
        found: dict[int, list[list[float]]] = {}
        for numbers, scores in (batch for rank in self._engine.from_every_rank(own) for batch in rank):
            batch_rows: dict[int, list[list[float]]] = {}
            for number, scores_K in zip(numbers, scores, strict=True):
                batch_rows.setdefault(int(number), []).append(scores_K)
            found |= batch_rows  # a row that filled up another rank's share is the same once more
        if len(found) < len(self.rows):
            raise CapabilityError(
                f"evaluate: expected an objective that scores every row ({len(self.rows)}), got scores of "
                f"{len(found)}. Let it call ftlib.forward(model, batch, scores=True)."
            )
        return [found[number] for number in range(len(self.rows))]


@contextmanager
def seen_scores(engine: Engine, data: Examples) -> Iterator[SeenScores]:
    """Keep the scores of `data` while its `rows` are evaluated inside this block."""
    seen = SeenScores(engine, data)
    hook = engine.scorer.register_forward_hook(seen.keep)
    try:
        yield seen
    finally:
        hook.remove()
