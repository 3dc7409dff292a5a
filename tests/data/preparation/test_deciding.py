"""Who decides about fixes, and the exit codes."""

from __future__ import annotations

import io
import sys

import pytest

from ftlib.__main__ import COMMANDS, main
from ftlib.data.preparation import CHECKS
from tests.data.preparation.harness import execute, pairs

ROWS = pairs(("What is a fen?", "A wet meadow"), ("Name a red berry", "cranberry or rowan"))
EDITS = ["prompt_separator", "completion_ending", "leading_space"]
CLASSES = pairs(*((f"Item {k}", ("yes", "no")[k % 2]) for k in range(12)))


def questions(said):
    """The checks that were asked about, in order."""
    return [part.rsplit("\n", 1)[-1].strip().split(":")[0] for part in said.split("? [Y/n]")[:-1]]


@pytest.mark.parametrize("yes", ["", "y", "Y", "yes", " YES "])
def test_these_words_accept(tmp_path, yes):
    run = execute(tmp_path, {"d.jsonl": ROWS}, answers=[yes] * 4)
    assert (run.exit, run.applied) == (0, EDITS)
    assert len(run.records) == 2


@pytest.mark.parametrize("no", ["n", "N", "no", "NO "])
def test_these_words_decline(tmp_path, no):
    run = execute(tmp_path, {"d.jsonl": ROWS}, answers=[no] * 3)
    assert (run.exit, run.applied, run.files) == (0, [], {})  # nothing is left to write, so nothing is asked


def test_another_word_is_asked_again(tmp_path):
    run = execute(tmp_path, {"d.jsonl": ROWS}, answers=["what?", "q", "no", "y", "n", "y"])
    assert run.applied == ["completion_ending"]


def test_questions_come_in_check_order_then_split_then_write(tmp_path):
    run = execute(tmp_path, {"d.jsonl": CLASSES + CLASSES}, answers=["n", "y", "y", "y", "y"])
    assert questions(run.said) == [
        "duplicate",
        "prompt_separator",
        "leading_space",
        "split",
        "Write the result",
    ]


def test_necessary_fixes_and_those_off_by_default_are_not_asked_about(tmp_path):
    rows = ROWS + pairs(("What is a fen", "a wet meadow!"), ("x", None))
    run = execute(tmp_path, {"d.json": rows}, answers=["n", "n", "n", "y"])
    assert questions(run.said) == [*EDITS, "Write the result"]
    assert run.applied == ["format", "empty_completion"]


@pytest.mark.parametrize("answers", [[], ["y"], ["y", "y", "y"], ["q"]])
def test_without_an_answer_nothing_is_written(tmp_path, answers):
    run = execute(tmp_path, {"d.jsonl": ROWS}, answers=answers)
    assert (run.exit, run.error["code"], run.files) == (1, "no_answer", {})


def test_writing_can_be_declined(tmp_path):
    run = execute(tmp_path, {"d.jsonl": ROWS}, answers=["y", "y", "y", "n"])
    assert (run.exit, run.files) == (0, {})
    assert run.report["outputs"] == {}


def test_no_declines_all_optional_fixes_but_not_the_necessary_ones(tmp_path):
    run = execute(tmp_path, {"d.json": ROWS}, "--no")
    assert run.applied == ["format"]
    assert [row["completion"] for row in run.records] == ["A wet meadow", "cranberry or rowan"]


def test_fix_overrides_quiet_no_and_questions(tmp_path):
    off = execute(tmp_path, {"a.jsonl": ROWS}, "--fix", "leading_space=off")
    assert off.applied == EDITS[:2]
    on = execute(tmp_path, {"b.jsonl": ROWS}, "--no", "--fix", "leading_space=on")
    assert on.applied == ["leading_space"]
    asked = execute(tmp_path, {"c.jsonl": ROWS}, "--fix", "prompt_separator=on", answers=["n", "n", "y"])
    assert questions(asked.said) == ["completion_ending", "leading_space", "Write the result"]
    assert asked.applied == ["prompt_separator"]


def test_a_dry_run_reports_everything_and_writes_nothing(tmp_path):
    dry = execute(tmp_path, {"d.jsonl": CLASSES}, "--dry-run")
    assert dry.files == {}
    wet = execute(tmp_path, {"d.jsonl": CLASSES})
    for key in ("findings", "actions", "tokens", "split", "inference", "rows", "task"):
        assert dry.report[key] == wet.report[key]


@pytest.mark.parametrize(("flags", "status"), [((), 0), (("--strict",), 3)])
def test_strict_turns_warnings_into_an_exit_code(tmp_path, flags, status):
    assert execute(tmp_path, {"d.jsonl": ROWS}, *flags).exit == status


def test_strict_is_content_with_notes(tmp_path):
    done = pairs(("What is a fen? ->", " A wet meadow\n"), ("Name a berry ->", " rowan\n"))
    run = execute(tmp_path, {"d.jsonl": done}, "--strict")
    assert {each["level"] for each in run.report["findings"]} == {"info"}
    assert run.exit == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fix", "leading_space"), "--fix duplicate=on"),
        (("--fix", "leading_space=maybe"), "ID=on or ID=off"),
        (("--fix", "tidy=on"), "'tidy'"),
        (("--fix", "format=off"), "'format'"),
        (("--map", "completion"), "--map completion=answer"),
        (("--no", "-q"), "--no"),
        (("--max-length", "0"), "max_length >= 1"),
        (("--validation", "1"), "validation < 1"),
        (("--ending", ""), "'eos'"),
        (("--split-method", "legacy", "--seed", "1"), "seed has no effect"),
        (("--encoding", "klingon"), "klingon"),
        (("--sheet", "all"), "sheet has no effect"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_right(tmp_path, flags, said):
    run = execute(tmp_path, {"d.jsonl": ROWS}, *flags)
    assert run.exit == 2
    assert said in run.error["message"]
    assert run.files == {}


def test_an_unknown_option_is_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", str(tmp_path / "d.jsonl"), "--speed"])
    assert caught.value.code == 2
    assert "--speed" in capsys.readouterr().err


def test_in_words_a_run_says_what_it_did(tmp_path, capsys, monkeypatch):
    (tmp_path / "d.jsonl").write_text(ROWS + pairs(("Who?", "")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\nn\ny\n"))
    assert main(["prepare", str(tmp_path / "d.jsonl")]) == 0
    said = capsys.readouterr().out
    for part in (
        "Append ' ->' to all prompts? [Y/n]",
        "d.jsonl: 3 rows, conditional",
        "! leading_space: 2 completions without a space at the start",
        "Applied: empty_completion, prompt_separator, completion_ending.",
        "Declined: leading_space.",
        "Left: 2 rows (1 dropped, 0 rejected).",
        "tokens per epoch",
        "d_prepared.jsonl",
    ):
        assert part in said


def test_nothing_to_do_says_so(tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text(pairs(("a fen ->", " wet\n"), ("Moss ->", " green\n")))
    assert main(["prepare", str(tmp_path / "d.jsonl")]) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_a_terminal_of_few_characters_shows_them_all(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl").write_text(pairs(("日本国", "東京 ja"), ("中国", "北京 zh")), encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["prepare", str(tmp_path / "d.jsonl"), "-q"]) == 0
    shown.flush()
    assert b"\\u56fd" in shown.buffer.getvalue()  # what all prompts end in


def test_every_check_says_when_it_speaks_and_optional_ones_what_they_do():
    assert all(check.trigger for check in CHECKS)
    assert all(bool(check.remedy) == (check.default is not None) for check in CHECKS)
    assert len({(check.name, check.trigger) for check in CHECKS}) == len(set(CHECKS))


def test_each_command_is_listed_and_has_its_own_help(capsys):
    for arguments in (["--help"], ["prepare", "--help"], ["preview", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    said = capsys.readouterr().out
    for part in (*COMMANDS, "--split-method", "--tokenizer"):
        assert part in said
