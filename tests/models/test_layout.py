"""The layout of groups, against a brute-force picture of who may see whom."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ftlib.batches import Span
from ftlib.models.layout import GroupLayout, causal_mask, tile_mask

SHAPES = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4
)
WINDOWS = st.none() | st.integers(1, 9)
BLOCKS = st.none() | st.integers(1, 5)


def spans_of(shapes: list[tuple[int, list[int]]]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for prefix, lengths in shapes:
        spans.append(Span(spans[-1].stop if spans else 0, prefix, tuple(lengths)))
    return tuple(spans)


def visibility(spans: tuple[Span, ...], window: int | None) -> Tensor:
    """[T, T] bool, pair by pair: the same group, the own branch or the prefix, not later, not too early."""
    place: list[tuple[int, int, int]] = []  # group, continuation (-1: the prefix), position
    for number, span in enumerate(spans):
        place += [(number, -1, position) for position in range(span.prefix)]
        for branch, length in enumerate(span.continuations):
            place += [(number, branch, span.prefix + position) for position in range(length)]

    def sees(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        related = key[0] == query[0] and key[1] in (-1, query[1])
        return related and key[2] <= query[2] and (window is None or key[2] > query[2] - window)

    return torch.tensor([[sees(query, key) for key in place] for query in place])


@settings(deadline=None, max_examples=60)
@given(shapes=SHAPES, window=WINDOWS, block=BLOCKS)
def test_tiles_cover_each_row_once_and_show_it_what_it_may_see(
    shapes: list[tuple[int, list[int]]], window: int | None, block: int | None
) -> None:
    spans = spans_of(shapes)
    seen_TT = torch.zeros(spans[-1].stop, spans[-1].stop, dtype=torch.bool)
    covered_T = torch.zeros(spans[-1].stop, dtype=torch.int64)
    for tile in GroupLayout(spans).tiles(window=window, block=block):
        keys = torch.cat([torch.arange(part.start, part.stop) for part in tile.keys])
        assert len(keys) == tile.columns
        assert block is None or tile.rows <= block
        mask = causal_mask(tile.rows, tile.columns, tile.offset, window, torch.float32, torch.device("cpu"))
        seen_TT[tile.queries, keys] = mask == 0
        covered_T[tile.queries] += 1
    assert_close(covered_T, torch.ones_like(covered_T))
    assert torch.equal(seen_TT, visibility(spans, window))


@settings(deadline=None, max_examples=40)
@given(shapes=SHAPES, window=WINDOWS, merge=st.integers(0, 40))
def test_merged_tiles_show_each_row_what_it_may_see(
    shapes: list[tuple[int, list[int]]], window: int | None, merge: int
) -> None:
    spans = spans_of(shapes)
    seen_TT = torch.zeros(spans[-1].stop, spans[-1].stop, dtype=torch.bool)
    for tile in GroupLayout(spans).tiles(window=window, block=4, merge=merge):
        keys = torch.cat([torch.arange(part.start, part.stop) for part in tile.keys])
        assert not tile.groups or tile.rows <= merge
        assert not seen_TT[tile.queries].any()
        seen_TT[tile.queries, keys] = tile_mask(tile, window, torch.float32, torch.device("cpu")) == 0
    assert torch.equal(seen_TT, visibility(spans, window))


def test_three_short_groups_share_one_tile() -> None:
    first, second = GroupLayout(spans_of([(0, [3]), (2, [2]), (0, [4]), (0, [9])])).tiles(merge=12)
    assert (first.queries, len(first.groups), second.queries) == (slice(0, 11), 3, slice(11, 20))


def test_a_window_leaves_keys_out_of_the_tile() -> None:
    """Rows 8 to 11 with a window of 3 reach back to row 6: six keys, not twelve."""
    *_, last = GroupLayout(spans_of([(0, [12])])).tiles(window=3, block=4)
    assert (last.queries, last.keys, last.offset) == (slice(8, 12), (slice(6, 12),), 2)


def test_the_layout_remembers_the_windows_asked_for() -> None:
    layout = GroupLayout(spans_of([(2, [3, 3])]))
    assert layout.windows == set()
    layout.tiles(window=None), layout.tiles(window=8, block=2)
    assert layout.windows == {None, 8}


def test_a_mask_first_made_in_inference_mode_can_be_saved_for_a_backward() -> None:
    causal_mask.cache_clear()
    with torch.inference_mode():
        causal_mask(3, 5, 2, None, torch.float32, torch.device("cpu"))
    mask = causal_mask(3, 5, 2, None, torch.float32, torch.device("cpu"))
    weight = torch.ones(3, 5, requires_grad=True)
    (weight * mask).sum().backward()  # the product saves the mask
    assert_close(weight.grad, mask)
