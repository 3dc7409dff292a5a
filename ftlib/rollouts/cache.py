"""A key/value cache that is not copied to grow by a token or to lose a row.

transformers' dynamic layers concatenate, which moves the whole cache for every new token. Here a layer
writes into a buffer with room to spare, doubled when it is full, and a row that is no longer wanted is
overwritten by the last one.

Shapes: R rows, H key/value heads, L tokens, D head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ftlib.errors import CapabilityError

__all__ = ["GrowingLayer", "decode_cache"]


def decode_cache(config: PretrainedConfig, *, limit: int, begun: DynamicCache | None = None) -> DynamicCache:
    """A cache for a decoder.

    Args:
        config: of the decoder.
        limit: most tokens a row will hold.
        begun: what every row starts with; None for empty rows.

    Raises:
        CapabilityError: layers that keep more than keys and values, whose state padding would change.
    """
    cache = DynamicCache(config=config)
    kinds = {type(layer) for layer in cache.layers}
    strange = kinds - {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
    if strange:
        raise CapabilityError(
            f"TransformersSampler: expected layers of attention alone, got "
            f"{sorted(kind.__name__ for kind in strange)}, which keep a running state that padding changes. "
            "Sample with vLLM: ftlib.rollouts.VLLMSampler."
        )
    # a sliding window stays transformers' own: what it moves is bounded by the window
    cache.layers = [GrowingLayer(limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    for index, layer in enumerate(() if begun is None else begun.layers):
        cache.update(*cast(tuple[Tensor, Tensor], (layer.keys, layer.values)), index)  # type: ignore[union-attr]
    return cache


class GrowingLayer(DynamicLayer):
    """One layer of the cache. Its first tokens, the prompts', are kept as they come.

    Args:
        limit: most tokens a row will hold; the buffer grows no larger.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self._buffers: tuple[Tensor, ...] = ()  # of keys and of values, once there is something to add

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add tokens to every row; returns all keys and values, [R, H, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        rows, length = len(key_states), self.get_seq_length()
        stop = length + key_states.shape[-2]
        if not self._buffers or stop > self._buffers[0].shape[-2]:
            self._move(torch.arange(rows, device=key_states.device), least=stop)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, length:stop] = new
        return self._view(rows, stop)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r becomes what row `beam_idx[r]` was; int64, any number of rows."""
        rows, length = len(beam_idx), self.get_seq_length()
        if not self._buffers or rows > len(self._buffers[0]):
            self._move(beam_idx, least=length + 1)
            return
        places_M = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
        for buffer in self._buffers:
            buffer[places_M, :, :length] = buffer[beam_idx[places_M], :, :length]
        self._view(rows, length)

    def _view(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """The part of the buffers in use, as keys and values."""
        keys, values = (buffer[:rows, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _move(self, rows_R: Tensor, *, least: int) -> None:
        """These rows into new buffers, with room for as many tokens again, and for `least` in all."""
        length = self.get_seq_length()
        capacity = max(least, min(2 * length, self.limit))
        buffers = []
        for old in (cast(Tensor, self.keys), cast(Tensor, self.values)):
            buffer = old.new_empty(len(rows_R), old.shape[1], capacity, old.shape[3])
            buffer[:, :, :length] = old[rows_R]
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        self._view(len(rows_R), length)
