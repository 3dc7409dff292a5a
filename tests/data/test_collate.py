from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ftlib.batches import Group, Span
from ftlib.data.collate import collate
from ftlib.errors import ShapeError

PROMPTED = {
    "prefix_ids": [1, 2],
    "prefix_weights": [0.0, 0.0],
    "continuation_ids": [[3, 4]],
    "continuation_weights": [[1.0, 0.5]],
    "length": 4,
    "source": "a:1",
}
PLAIN = {
    "prefix_ids": [],
    "prefix_weights": [],
    "continuation_ids": [[5, 6, 7]],
    "continuation_weights": [[1.0, 0.0, 1.0]],
    "length": 3,
    "source": "a:2",
}
PAIR = {
    "prefix_ids": [1, 2],
    "prefix_weights": [0.0, 0.0],
    "continuation_ids": [[3, 4], [8]],
    "continuation_weights": [[1.0, 1.0], [1.0]],
    "length": 5,
    "source": "a:3",
}


def scored(batch):
    return list(zip(batch.rows_N.tolist(), batch.targets_N.tolist(), batch.owner_N.tolist(), strict=True))


def test_the_last_prefix_row_predicts_the_first_token():
    batch = collate([PROMPTED])
    assert batch.ids_T.tolist() == [1, 2, 3, 4]
    assert batch.positions_T.tolist() == [0, 1, 2, 3]
    assert batch.spans == (Span(0, 2, (2,)),)
    assert scored(batch) == [(1, 3, 0), (2, 4, 0)]
    assert_close(batch.weights_N, torch.tensor([1.0, 0.5]))


def test_plain_text_leaves_its_first_token_and_weight_zero_unscored():
    assert scored(collate([PLAIN])) == [(1, 7, 0)]


def test_score_all_scores_every_token_that_has_a_predecessor():
    assert scored(collate([PLAIN], score_all=True)) == [(0, 6, 0), (1, 7, 0)]
    assert collate([PLAIN], score_all=True).weights_N.tolist() == [0.0, 1.0]


def test_continuations_share_the_prefix_and_restart_at_its_length():
    batch = collate([PLAIN, PAIR])
    assert batch.ids_T.tolist() == [5, 6, 7, 1, 2, 3, 4, 8]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 2]
    assert batch.spans == (Span(0, 0, (3,)), Span(3, 2, (2, 1)))
    # Row 4, the last of the prefix, predicts the first token of both continuations.
    assert scored(batch) == [(1, 7, 0), (4, 3, 1), (5, 4, 1), (4, 8, 2)]
    assert batch.continuations == 3


def test_no_document_predicts_the_next_one():
    batch = collate([PLAIN, PLAIN], score_all=True)
    assert all(row // 3 == (row + 1) // 3 for row in batch.rows_N.tolist())


def test_weighted_prompt_tokens_belong_to_their_continuation():
    batch = collate([PLAIN, {**PROMPTED, "prefix_weights": [0.1, 0.1]}])
    assert scored(batch) == [(1, 7, 0), (3, 2, 1), (4, 3, 1), (5, 4, 1)]


def test_rows_and_groups_give_the_same_batch():
    group = Group(torch.tensor([1, 2]), torch.zeros(2), (torch.tensor([3, 4]),), (torch.tensor([1.0, 0.5]),))
    row, same = collate([PROMPTED]), collate([group])
    for name in ("ids_T", "positions_T", "rows_N", "targets_N", "weights_N", "owner_N"):
        assert torch.equal(getattr(row, name), getattr(same, name))
        assert getattr(row, name).dtype == getattr(same, name).dtype


def test_further_numbers_per_continuation_become_extras():
    batch = collate([{**PAIR, "margin": [1, 0.5]}, {**PLAIN, "margin": [2]}])
    assert_close(batch.extras["margin"], torch.tensor([1.0, 0.5, 2.0]))


def test_extras_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"one margin per continuation \(2\), got 1"):
        collate([{**PAIR, "margin": [1]}])
    with pytest.raises(ShapeError, match=r"extras \['margin'\] in every example, got \[\]"):
        collate([{**PAIR, "margin": [1, 2]}, PAIR])


def test_records_that_were_not_encoded_are_refused():
    with pytest.raises(ShapeError, match="Encode them first"):
        collate([{"text": "a"}])
    with pytest.raises(ShapeError, match="at least one example"):
        collate([])


def test_an_example_without_weight_gives_no_rows():
    batch = collate([{**PLAIN, "continuation_weights": [[0.0, 0.0, 0.0]]}])
    assert len(batch.rows_N) == 0
    assert batch.tokens == 3
