"""The fingerprint of encoded data says whether two data sets train alike, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ftlib.data.encode import COLUMNS
from ftlib.engine import TrainConfig
from ftlib.trainers import fingerprint
from ftlib.trainers.card import card_data
from ftlib.trainers.fingerprint import data_fingerprint
from tests.trainers.tiny import rows

Row = dict[str, Any]


def answers(count: int) -> list[Row]:
    """Rows of two continuations each, with an extra."""
    made = rows(count)
    for index, row in enumerate(made):
        row["continuation_ids"] = [row["continuation_ids"][0], [7] * (1 + index % 3)]
        row["continuation_weights"] = [row["continuation_weights"][0], [1.0] * (1 + index % 3)]
        row["margin"] = [0.5 * index, 0.0]
    return made


DATA = answers(9)
NUMBERS = {"margin": List(Value("float32"))}
WIDE = Features(
    {
        "prefix_ids": List(Value("int64")),
        "prefix_weights": List(Value("float64")),
        "continuation_ids": List(List(Value("int64"))),
        "continuation_weights": List(List(Value("float64"))),
        "length": Value("int64"),
        "source": Value("string"),
        "margin": List(Value("float64")),
    }
)


def encoded(data: Sequence[Row] = DATA) -> Dataset:
    return Dataset.from_list(list(data), features=Features({**COLUMNS, **NUMBERS}))


def as_tensors(row: Row) -> Row:
    return {
        **row,
        "prefix_ids": torch.tensor(row["prefix_ids"]),
        "continuation_ids": [torch.tensor(ids) for ids in row["continuation_ids"]],
        "continuation_weights": tuple(np.array(each) for each in row["continuation_weights"]),
    }


def on_disk(folder: Any) -> Dataset:
    encoded().save_to_disk(folder / "data")
    return Dataset.load_from_disk(folder / "data")


HELD: dict[str, Callable[[Any], Any]] = {
    "a list": lambda folder: DATA,
    "a tuple": lambda folder: tuple(DATA),
    "tensors and arrays": lambda folder: [as_tensors(row) for row in DATA],
    "wider types": lambda folder: Dataset.from_list(DATA, features=WIDE),
    "columns in another order": lambda folder: encoded().select_columns(sorted(DATA[0], reverse=True)),
    "several pieces": lambda folder: concatenate_datasets([encoded(DATA[:2]), encoded(DATA[2:])]),
    "chosen by index": lambda folder: encoded([*DATA[::-1], DATA[0]]).select(range(8, -1, -1)),
    "a slice of more": lambda folder: encoded([DATA[3], *DATA, DATA[4]]).select(range(1, 10)),
    "shown as tensors": lambda folder: encoded().with_format("torch"),
    "made by a transform": lambda folder: encoded().with_transform(lambda batch: batch),
    "on disk": on_disk,
}


@pytest.mark.parametrize("rows_at_once", [1, 4, 9, 4096])
@pytest.mark.parametrize("held", HELD)
def test_it_is_that_of_the_content_however_held(tmp_path, monkeypatch, held, rows_at_once):
    expected = data_fingerprint(encoded())
    monkeypatch.setattr(fingerprint, "_ROWS", rows_at_once)
    assert data_fingerprint(HELD[held](tmp_path)) == expected


def test_where_rows_came_from_does_not_count():
    renamed = [{**row, "source": "elsewhere"} for row in DATA]
    assert data_fingerprint(encoded(renamed)) == data_fingerprint(encoded())


def changed(change: Callable[[list[Row]], Any]) -> list[Row]:
    data = deepcopy(DATA)
    change(data)
    return data


def move_first_token_to_the_prefix(data: list[Row]) -> None:
    """All numbers stay in place, but for the border between prefix and continuation."""
    data[0]["prefix_ids"].append(data[0]["continuation_ids"][0].pop(0))
    data[0]["prefix_weights"].append(data[0]["continuation_weights"][0].pop(0))


def move_the_border_of_the_continuations(data: list[Row]) -> None:
    for name in ("continuation_ids", "continuation_weights"):
        first, second = data[0][name]
        second.insert(0, first.pop())


def move_a_continuation_to_the_next_row(data: list[Row]) -> None:
    for name in ("continuation_ids", "continuation_weights"):
        data[1][name].insert(0, data[0][name].pop())


def a_little_more(data: list[Row]) -> None:
    weights = data[2]["continuation_weights"][0]
    weights[0] = float(np.nextafter(np.float32(weights[0]), np.float32(9)))


CHANGES: dict[str, Callable[[list[Row]], Any]] = {
    "one id of the prefix": lambda data: data[4]["prefix_ids"].__setitem__(0, 11),
    "one id of a continuation": lambda data: data[8]["continuation_ids"][1].__setitem__(0, 11),
    "a weight by its last bit": a_little_more,
    "a weight of the prefix": lambda data: data[0]["prefix_weights"].__setitem__(0, 1.0),
    "an extra": lambda data: data[0]["margin"].__setitem__(1, 1.0),
    "the order of rows": lambda data: data.reverse(),
    "the order of continuations": lambda data: data[0]["continuation_ids"].reverse(),
    "one row less": lambda data: data.pop(),
    "one row twice": lambda data: data.append(data[0]),
    "prefix and continuation": move_first_token_to_the_prefix,
    "two continuations": move_the_border_of_the_continuations,
    "two rows": move_a_continuation_to_the_next_row,
    "an extra's name": lambda data: [row.update({"lead": row.pop("margin")}) for row in data],
    "no extra": lambda data: [row.pop("margin") for row in data],
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_training_would_notice_changes_it(name):
    data = changed(CHANGES[name])
    assert data_fingerprint(data) != data_fingerprint(DATA)
    assert data_fingerprint(Dataset.from_list(data)) == data_fingerprint(data)


def test_no_row_of_a_data_set_is_made_in_python(monkeypatch):
    """Reading rows is what took minutes for a million of them."""
    data, expected = encoded(), data_fingerprint(DATA)
    taken: list[Any] = []
    take = Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: [taken.append(key), take(self, key)][1])
    assert data_fingerprint(data) == expected
    assert taken == [0], "the names of the columns"


@pytest.mark.parametrize("held", [encoded, list])
def test_the_model_card_tells_the_share_of_tokens_trained(held):
    data = answers(2)
    data[0]["continuation_weights"][1] = [0.0] * len(data[0]["continuation_ids"][1])
    tokens = sum(row["length"] for row in rows(2)) + 1 + 2  # the second answers have 1 and 2 tokens
    untrained = sum(len(row["prefix_ids"]) for row in data) + 1
    card = card_data("SFT", TrainConfig(), 1e-4, held(data), None, [])
    assert card.trained_share == pytest.approx(1 - untrained / tokens)


def test_messages_of_a_prompt_are_known_by_their_ids() -> None:
    """Rows of prompts carry them for the reward; a list of messages is no column of numbers."""
    row = {
        "prefix_ids": [3, 4],
        "prefix_weights": [0.0, 0.0],
        "continuation_ids": [],
        "continuation_weights": [],
    }
    asked = {**row, "prompt": [{"role": "user", "content": "hello"}]}
    assert data_fingerprint([asked]) == data_fingerprint([row])
    assert data_fingerprint([{**asked, "prefix_ids": [3, 5]}]) != data_fingerprint([row])
