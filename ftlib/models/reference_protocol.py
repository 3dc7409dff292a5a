"""What a reference offers.

Shapes: N scored rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ftlib.batches import PackedBatch

__all__ = ["KeptReference", "Reference"]


@runtime_checkable
class Reference(Protocol):
    """What a policy is compared with."""

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probability of each scored token in nats, float32 [N], detached, on the batch's device."""


@runtime_checkable
class KeptReference(Reference, Protocol):
    """A reference that says what it computes with, and that checkpoints can hold. Those made here are."""

    def mark(self) -> Hashable:
        """Another value after any change of its weights that torch sees, so none made through `.data`."""

    def fingerprint(self) -> str:
        """SHA-256 of what its numbers depend on beside the batch; the same in every process."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, and values that JSON holds, by name: what a resumed run could not make again."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take such a state over."""
