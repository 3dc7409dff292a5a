"""Which examples a step trains on, how they fill micro-batches, and how ranks share them.

Everything here is a pure function of its arguments: equal inputs give equal batches on every rank and
after every resume.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import final

import torch

from ftlib.errors import ConfigError

__all__ = ["StepSampler", "balance", "pack"]


@final
class StepSampler:
    """The examples of each optimiser step, with a cursor that is exact to the example.

    An epoch visits every example once, in an order drawn from `(seed, epoch)` alone. Batches never
    cross epochs, so the last step of an epoch may be smaller.

    Args:
        size: number of examples, >= 1.
        batch_size: examples per optimiser step over all ranks, >= 1.
        seed: any integer.
        shuffle: False keeps the order of the data in every epoch.

    Raises:
        ConfigError: a size below 1.

    Example:
        >>> sampler = StepSampler(3, batch_size=2, shuffle=False)
        >>> sampler.next_batch(), sampler.next_batch(), sampler.state_dict()
        ([0, 1], [2], {'epoch': 1, 'offset': 0})
    """

    def __init__(self, size: int, *, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        for name, value in (("size", size), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"StepSampler: expected {name} >= 1, got {value}.")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = 0
        self._offset = 0
        self._order: tuple[int, list[int]] | None = None  # (epoch, its permutation)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that visit every example once."""
        return -(-self.size // self.batch_size)

    def next_batch(self) -> list[int]:
        """Indices of the next step's examples; moves the cursor past them."""
        batch = self.order(self._epoch)[self._offset : self._offset + self.batch_size]
        self._offset += len(batch)
        if self._offset == self.size:
            self._epoch, self._offset = self._epoch + 1, 0
        return batch

    def order(self, epoch: int) -> list[int]:
        """The permutation of one epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _permutation(self.size, self.seed, epoch, shuffle=self.shuffle))
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        """The cursor: completed epochs, and examples already taken from the current one."""
        return {"epoch": self._epoch, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ConfigError: missing or extra keys, or a cursor outside this data.
        """
        if set(state) != {"epoch", "offset"}:
            raise ConfigError(f"StepSampler: expected a state of epoch and offset, got {sorted(state)}.")
        epoch, offset = int(state["epoch"]), int(state["offset"])
        if epoch < 0 or not 0 <= offset < self.size:
            raise ConfigError(
                f"StepSampler: expected epoch >= 0 and 0 <= offset < {self.size}, got epoch {epoch} and "
                f"offset {offset}. The state belongs to other data."
            )
        self._epoch, self._offset = epoch, offset


def _permutation(size: int, seed: int, epoch: int, *, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(size))
    # Hashed, because neighbouring seeds of a generator give related streams.
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items gathered into micro-batches of at most `max_tokens`, by best fit decreasing.

    No item is split. An item longer than `max_tokens` stands alone.

    Args:
        lengths: tokens of each item, >= 0.
        max_tokens: tokens per micro-batch, >= 1.

    Returns:
        Indices into `lengths`, ascending within a micro-batch; each index exactly once.

    Raises:
        ConfigError: `max_tokens` below 1.

    Source: Johnson 1973, best fit decreasing; at most 11/9 of the fewest bins plus a constant.

    Example:
        >>> pack([5, 3, 4, 9], max_tokens=8)
        [[3], [0, 1], [2]]
    """
    if max_tokens < 1:
        raise ConfigError(f"pack: expected max_tokens >= 1, got {max_tokens}.")
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), ascending: the tightest fit is found first
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fit = bisect_left(rooms, (lengths[index], -1))
        if fit < len(rooms):
            room, chosen = rooms.pop(fit)
        else:
            room, chosen = max_tokens, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if room > lengths[index]:
            insort(rooms, (room - lengths[index], chosen))
    return [sorted(members) for members in bins]


def balance(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Items of one step dealt to ranks so that their tokens are nearly equal.

    The longest item left goes to the rank with the fewest tokens (then fewest items, then lowest
    number). A rank is empty only when there are fewer items than ranks.

    Args:
        lengths: tokens of each item.
        ranks: number of ranks, >= 1.

    Returns:
        One ascending list of indices per rank.

    Raises:
        ConfigError: `ranks` below 1.

    Source: Graham 1969, longest processing time first; at most 4/3 of the best possible maximum.

    Example:
        >>> balance([5, 3, 4, 9], ranks=2)
        [[1, 3], [0, 2]]
    """
    if ranks < 1:
        raise ConfigError(f"balance: expected ranks >= 1, got {ranks}.")
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(ranks), key=lambda r: (tokens[r], len(dealt[r]), r))
        dealt[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(members) for members in dealt]
