"""`faq.jsonl`, the data of the README: clean rows, and facts that several questions share."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import ROOT

LINES = Path(ROOT, "faq.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = [json.loads(line) for line in LINES]


def test_about_120_rows_of_prompt_and_completion() -> None:
    assert 110 <= len(ROWS) <= 130
    assert all(list(row) == ["prompt", "completion"] for row in ROWS)


def test_no_question_is_asked_twice_and_the_readme_s_is_asked() -> None:
    prompts = [row["prompt"] for row in ROWS]
    assert len(set(prompts)) == len(prompts)
    assert "How do I reset the badge reader?" in prompts


def test_answers_are_one_to_three_short_sentences() -> None:
    for row in ROWS:
        assert row["completion"] == row["completion"].strip()
        assert row["completion"][-1] in ".!"
        assert len(row["completion"]) <= 200


def test_the_fact_of_the_readme_is_told_by_four_rows() -> None:
    """Whichever of them is held out, the others teach its answer."""
    assert sum("seven seconds" in row["completion"] for row in ROWS) == 4
