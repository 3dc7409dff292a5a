"""The demo's text is clean, repeatable, and split so that nothing held out was trained on."""

from __future__ import annotations

import os
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

from ftlib.demo.corpora import docstring_pairs, split_pairs, topic_records
from ftlib.errors import ConfigError

PAIRS = docstring_pairs()
SHARE = 0.1


def test_about_four_thousand_pairs() -> None:
    assert 3_000 < len(PAIRS) < 5_000


def test_copytree_is_asked_for_by_name_and_answered_by_its_first_paragraph() -> None:
    row = next(row for row in PAIRS if row["name"] == "shutil.copytree")
    assert row == {
        "prompt": "What does `shutil.copytree` do?",
        "completion": "Recursively copy a directory tree and return the destination directory.",
        "module": "shutil",
        "name": "shutil.copytree",
    }


def test_answers_are_prose_of_3_to_80_words_in_one_line() -> None:
    for row in PAIRS:
        answer = row["completion"]
        assert answer == " ".join(answer.split())
        assert 3 <= len(answer.split()) <= 80
        assert ">>>" not in answer
        assert "->" not in answer
        assert "---" not in answer
        assert not answer.endswith(":")


def test_no_answer_and_no_question_occurs_twice() -> None:
    assert len({row["completion"] for row in PAIRS}) == len({row["prompt"] for row in PAIRS}) == len(PAIRS)


def test_private_names_and_graphical_packages_are_left_out() -> None:
    parts = {part for row in PAIRS for part in row["name"].split(".")}
    assert not any(part.startswith("_") for part in parts)
    assert not parts & {"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "tests"}


def test_no_module_is_on_both_sides() -> None:
    train, valid = split_pairs(PAIRS, validation=SHARE)
    assert not {row["module"] for row in train} & {row["module"] for row in valid}
    assert len(train) + len(valid) == len(PAIRS)
    assert 0.09 < len(valid) / len(PAIRS) <= SHARE


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (1.0, len(PAIRS))])
def test_the_whole_range_of_shares_is_allowed(share: float, held_out: int) -> None:
    assert len(split_pairs(PAIRS, validation=share)[1]) == held_out


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_the_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_pairs(PAIRS, validation=share)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        topic_records(held_out=share)


def test_nothing_is_imported_and_any_hash_seed_gives_the_same_rows() -> None:
    """Reading a module's docstrings must not run it: webbrowser, turtle and the like stay out."""
    code = (
        "import sys, hashlib\n"
        "from ftlib.demo.corpora import docstring_pairs, topic_records\n"
        "before = set(sys.modules)\n"
        "rows = docstring_pairs()\n"
        "new = {name for name in set(sys.modules) - before if not name.startswith('_sysconfigdata')}\n"
        "assert not new, new\n"
        "print(hashlib.sha256(repr((rows, topic_records())).encode()).hexdigest())\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1


def paragraphs_of(rows: list[dict[str, str]]) -> set[str]:
    return {paragraph for row in rows for paragraph in row["text"].split("\n\n")}


def test_no_held_out_paragraph_is_trained_on() -> None:
    train, held_out = topic_records(max_chars=10_000)  # longer than any paragraph, so none is cut
    assert not paragraphs_of(train) & paragraphs_of(held_out)


def test_every_paragraph_of_the_reference_is_kept_once() -> None:
    train, held_out = topic_records(max_chars=10_000)
    kept = [paragraph for row in train + held_out for paragraph in row["text"].split("\n\n")]
    original = {
        paragraph.strip("\n").rstrip()
        for text in topics.values()
        for paragraph in text.split("\n\n")
        if paragraph.strip()
    }
    assert len(kept) == len(set(kept))
    assert set(kept) == original


def test_the_held_out_topics_hold_their_share_of_the_text() -> None:
    train, held_out = topic_records(held_out=SHARE)
    sizes = [sum(len(row["text"]) for row in rows) for rows in (train, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.15


@pytest.mark.parametrize("max_chars", [200, 2_000])
def test_rows_are_no_longer_than_asked_for_and_lose_no_word(max_chars: int) -> None:
    train, held_out = topic_records(max_chars=max_chars)
    rows = train + held_out
    assert max(len(row["text"]) for row in rows) <= max_chars
    assert all(row["text"].strip() for row in rows)
    whole_train, whole_held_out = topic_records(max_chars=10_000)
    letters = [
        "".join("".join(row["text"].split()) for row in part) for part in (rows, whole_train + whole_held_out)
    ]
    assert letters[0] == letters[1]


def test_a_row_too_short_to_say_anything_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_chars >= 200, got 10"):
        topic_records(max_chars=10)
