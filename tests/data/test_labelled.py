"""Labelled texts to ids: exactly what the tokenizer itself makes of them, with every bad row named."""

from __future__ import annotations

import json

import datasets
import pandas as pd
import pytest

from ftlib.data import LabelledEncoder, Labels
from ftlib.data.labelled import labelled_records, labels_in
from ftlib.errors import ConfigError, DataError
from tests.data.tokenizers_zoo import tiny
from tests.encoders import ENCODERS, TEXTS, encoder_tokenizer

PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
ROWS = [{"text": text, "label": "ab"[index % 2]} for index, text in enumerate(TEXTS)]


def ids(row):
    return [*row["prefix_ids"], *row["continuation_ids"][0]]


@pytest.mark.parametrize("arch", ENCODERS)
def test_ids_and_segments_are_the_tokenizers_own(arch):
    tokenizer = encoder_tokenizer(arch)
    single = LabelledEncoder(tokenizer)([{"text": text} for text in TEXTS])
    assert [ids(row) for row in single] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(row["prefix_ids"] == [] for row in single)
    pairs = LabelledEncoder(tokenizer)([{"text_a": a, "text_b": b} for a, b in PAIRS])
    own = [tokenizer(a, b, return_token_type_ids=True) for a, b in PAIRS]
    assert [ids(row) for row in pairs] == [each["input_ids"] for each in own]
    segments = [[0] * len(row["prefix_ids"]) + [1] * len(row["continuation_ids"][0]) for row in pairs]
    if arch != "roberta":  # whose template tells no segments apart
        assert segments == [each["token_type_ids"] for each in own]
    else:
        assert all(row["prefix_ids"] == [] for row in pairs)


def test_two_texts_without_a_template_for_pairs_stand_on_two_lines():
    tokenizer = tiny()
    [row] = LabelledEncoder(tokenizer)([{"text_a": "yes", "text_b": "no"}])
    plain = tokenizer.num_special_tokens_to_add(pair=True) == tokenizer.num_special_tokens_to_add(pair=False)
    expected = tokenizer("yes\nno") if plain else tokenizer("yes", "no")
    assert ids(row) == expected["input_ids"]


def test_control_tokens_in_a_text_stay_text_and_are_counted():
    tokenizer = encoder_tokenizer()
    encoder = LabelledEncoder(tokenizer)
    [row] = encoder([{"text": "the cat [SEP] sat"}])
    assert ids(row).count(tokenizer.sep_token_id) == 1
    assert tokenizer("the cat [SEP] sat")["input_ids"].count(tokenizer.sep_token_id) == 2
    assert encoder.report.control_text == 1


def test_the_tokenizer_is_left_alone():
    tokenizer = encoder_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    before = tokenizer.backend_tokenizer.to_str()
    rows = LabelledEncoder(tokenizer, max_length=5, overflow="truncate")(ROWS)
    assert tokenizer.backend_tokenizer.to_str() == before
    assert max(row["length"] for row in rows) == 5
    assert len({row["length"] for row in rows}) > 1


def test_rows_are_cut_from_the_right_whatever_the_tokenizers_own_side():
    tokenizer = encoder_tokenizer()
    right = LabelledEncoder(tokenizer, max_length=5, overflow="truncate")([{"text": TEXTS[0]}])
    tokenizer.truncation_side = "left"
    left = LabelledEncoder(tokenizer, max_length=5, overflow="truncate")([{"text": TEXTS[0]}])
    assert ids(left[0]) == ids(right[0])
    assert tokenizer.truncation_side == "left"


@pytest.mark.parametrize("kind", ["list", "frame", "dataset", "jsonl", "csv"])
def test_rows_come_from_anywhere(kind, tmp_path):
    frame = pd.DataFrame(ROWS)
    source = {"list": ROWS, "frame": frame, "dataset": datasets.Dataset.from_list(ROWS)}.get(kind)
    if kind == "jsonl":
        source = tmp_path / "rows.jsonl"
        source.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif kind == "csv":
        source = tmp_path / "rows.csv"
        frame.to_csv(source, index=False)
    encoder = LabelledEncoder(encoder_tokenizer())
    assert [row["label"] for row in encoder(source)] == [[float(i % 2)] for i in range(len(ROWS))]
    assert encoder.labels == Labels(("a", "b"))


def test_the_names_of_a_class_label_come_with_it():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    data = datasets.Dataset.from_list([{"text": "sun", "label": 1}, {"text": "snow", "label": 0}], features)
    assert labelled_records(data)["label"][:] == ["neg", "pos"]
    assert labels_in(labelled_records(data)) == Labels(("neg", "pos"))


def test_plain_texts_and_rows_without_a_label_can_be_encoded():
    encoder = LabelledEncoder(encoder_tokenizer(), labels=Labels(("a", "b")))
    assert "label" not in encoder(TEXTS).column_names
    assert ids(encoder(TEXTS)[3]) == ids(encoder(ROWS)[3])
    assert encoder(ROWS)[0]["weight"] == [1.0]


def test_every_bad_row_is_named_with_its_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = [ROWS[0], {"text": "sun", "label": "c"}, ROWS[1], {"text": " ", "label": "a"}, {"text": "sun"}]
    path.write_text("\n".join(map(json.dumps, bad)), encoding="utf-8")
    encoder = LabelledEncoder(encoder_tokenizer(), labels=Labels(("a", "b")))
    with pytest.raises(DataError) as caught:
        encoder(path)
    message = str(caught.value)
    assert f"{path}:2:label: expected one of the classes ['a', 'b'], got 'c'" in message
    assert f"{path}:4:text: expected non-empty text" in message
    assert f"{path}:5:label: expected a class" in message
    assert f"{path}:1:" not in message
    assert f"{path}:3:" not in message


def test_labels_that_do_not_go_together_are_named_with_their_rows():
    rows = [{"text": "sun", "label": ["a"]}, {"text": "snow", "label": None}]
    with pytest.raises(DataError, match=r"<list>:2:label: expected a class"):
        labels_in(labelled_records(rows))


def test_missing_columns_are_said_with_a_way_to_map_them():
    with pytest.raises(DataError, match=r"columns text, or text_a and text_b, found .*'body'.*columns="):
        labelled_records([{"body": "sun", "label": "a"}])
    with pytest.raises(DataError, match=r"a column label, found"):
        labels_in(labelled_records([{"text": "sun"}]))


@pytest.mark.parametrize("overflow", ["error", "drop", "truncate"])
def test_a_row_that_is_too_long_is_refused_dropped_or_cut_with_a_count(overflow):
    tokenizer, longest = encoder_tokenizer(), max(TEXTS, key=len)
    encoder = LabelledEncoder(tokenizer, max_length=10, overflow=overflow)
    if overflow == "error":
        with pytest.raises(DataError, match=r"<list>:3: expected at most 10 tokens, got 15"):
            encoder(ROWS)
        return
    rows = encoder(ROWS)
    if overflow == "drop":
        assert len(rows) == len(ROWS) - 1
        assert encoder.report.dropped == {"too_long": 1}
        return
    own = tokenizer(longest, truncation=True, max_length=10)["input_ids"]
    assert ids(rows[TEXTS.index(longest)]) == own
    assert own[-1] == tokenizer.sep_token_id
    assert encoder.report.truncated == 1


def test_options_without_effect_and_unknown_ones_are_refused():
    with pytest.raises(ConfigError, match="no effect without max_length"):
        LabelledEncoder(encoder_tokenizer(), overflow="drop")
    with pytest.raises(ConfigError, match="overflow as one of"):
        LabelledEncoder(encoder_tokenizer(), max_length=3, overflow="cut")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_length >= 1"):
        LabelledEncoder(encoder_tokenizer(), max_length=0)
