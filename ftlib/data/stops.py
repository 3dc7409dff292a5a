"""Whether what is trained ends where the model is to stop."""

from __future__ import annotations

from collections.abc import Sequence, Set

from ftlib.data.tokens import TokenBackend

__all__ = ["last_trained", "stop_is_trained"]


def last_trained(weights: Sequence[float]) -> int | None:
    """Position of the last token of weight > 0."""
    return next((i for i in range(len(weights) - 1, -1, -1) if weights[i] > 0), None)


def stop_is_trained(
    ids: Sequence[int], weights: Sequence[float], stop_ids: Set[int], backend: TokenBackend
) -> bool:
    """Whether the trained tokens end in a stop token, or in one and what a template writes after it.

    That is blank, or a control token: ChatML ends every turn in a line end, Phi-3 a conversation in EOS. They
    are trained where every token is.
    """
    last = last_trained(weights)
    if last is None:
        return False
    stop = next((i for i in range(last, -1, -1) if ids[i] in stop_ids), None)
    if stop is None or weights[stop] <= 0:
        return False
    return stop == last or not backend.control.sub("", backend.decode(ids[stop + 1 : last + 1])).strip()
