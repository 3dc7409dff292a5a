from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, Lfm2Config
from transformers.cache_utils import DynamicLayer

from ftlib.errors import CapabilityError
from ftlib.rollouts.cache import GrowingLayer, decode_cache

HEADS, WIDTH = 2, 3


def states(rows, tokens, generator):
    shape = (rows, HEADS, tokens, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_what_transformers_own_layer_holds(seed):
    """Prompts, spread to samples, then tokens and rows that end, in random order."""
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = GrowingLayer(limit=40), DynamicLayer()
    rows = 3

    def same_update(tokens):
        keys, values = states(rows, tokens, generator)
        for mine, own in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert_close(mine, own, rtol=0, atol=0)

    same_update(5)
    spread = torch.randint(0, 3, (8,), generator=generator)
    ours.reorder_cache(spread)
    theirs.reorder_cache(spread)
    rows = 8
    for _ in range(30):
        same_update(1)
        if rows > 1 and torch.rand((), generator=generator) < 0.25:
            kept = torch.randperm(rows, generator=generator)[: rows - 1]
            ours.reorder_cache(kept)
            theirs.reorder_cache(kept)
            rows -= 1
    assert rows < 8
    assert ours.get_seq_length() == theirs.get_seq_length() == 35


def test_a_token_is_written_beside_the_others_without_moving_them():
    generator = torch.Generator().manual_seed(0)
    layer, places = GrowingLayer(limit=64), []
    layer.update(*states(2, 4, generator))
    for _ in range(60):
        layer.update(*states(2, 1, generator))
        places.append(layer.keys.data_ptr())
    moves = sum(before != after for before, after in pairwise(places))
    assert moves == 3  # room for 8, 16, 32, 64
    assert layer._buffers[0].shape[-2] == 64


def test_a_row_that_ends_moves_one_row_at_most():
    generator = torch.Generator().manual_seed(0)
    layer = GrowingLayer(limit=64)
    layer.update(*states(4, 4, generator))
    layer.reorder_cache(torch.arange(4))
    place, last = layer.keys.data_ptr(), layer.keys[3].clone()
    layer.reorder_cache(torch.tensor([0, 3, 2]))
    assert layer.keys.data_ptr() == place
    assert torch.equal(layer.keys[1], last)


def test_layers_with_a_running_state_are_refused_by_name():
    config = Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(CapabilityError, match="LinearAttentionLayer"):
        decode_cache(config, limit=8)
    assert len(decode_cache(GPT2Config(n_layer=3), limit=8)) == 3
