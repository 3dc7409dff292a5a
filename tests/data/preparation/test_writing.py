"""What is left on disk: names, reports, nothing half-written, nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import load_records, prepare
from ftlib.data.preparation import publish
from ftlib.data.preparation.checks import EDITS
from ftlib.data.preparation.spool import Spool
from ftlib.errors import ConfigError, DataError
from tests.conftest import ROOT
from tests.data.preparation.harness import execute, lines, pairs

FACTS = [
    ("What is a fen?", "A wet meadow"),
    ("Name a red berry", "cranberry or rowan"),
    ("How old?", "Very old"),
]
ROWS = pairs(*FACTS)
CLASSES = pairs(*((f"Item {k}", ("yes", "no")[k % 2]) for k in range(40)))


def test_names_say_what_is_in_a_file(tmp_path):
    assert set(execute(tmp_path, {"faq.v2.jsonl": ROWS}).files) == {
        "faq.v2_prepared.jsonl",
        "faq.v2_prepared.report.json",
    }
    assert set(execute(tmp_path, {"mail.jsonl": CLASSES}).files) == {
        "mail_prepared_train.jsonl",
        "mail_prepared_valid.jsonl",
        "mail_prepared.report.json",
        "mail_prepared.rows.report.json",  # forty rows were changed, the report names twenty
    }


@pytest.mark.parametrize("taken", ["d_prepared_valid.jsonl", "d_prepared.report.json"])
def test_a_name_that_is_taken_moves_all_names_on(tmp_path, taken):
    run = execute(tmp_path, {"d.jsonl": CLASSES, taken: "mine", "d_prepared_train (1).jsonl": "mine too"})
    assert set(run.data) == {"d_prepared_train (2).jsonl", "d_prepared_valid (2).jsonl"}
    assert "d_prepared (2).report.json" in run.files


def test_another_folder_is_made(tmp_path):
    execute(tmp_path, {"d.jsonl": ROWS}, "--out", str(tmp_path / "new" / "place"))
    assert (tmp_path / "new" / "place" / "d_prepared.jsonl").is_file()
    assert not (tmp_path / "d_prepared.jsonl").exists()


def test_the_report_beside_the_data_is_the_printed_one(tmp_path):
    run = execute(tmp_path, {"d.jsonl": ROWS})
    assert json.loads(run.files["d_prepared.report.json"]) == run.report
    assert run.report["outputs"] == {"d_prepared.jsonl": 3}
    assert run.report["input"]["sha256"] == hashlib.sha256(ROWS.encode()).hexdigest()
    assert run.report["hashes"] == {
        "d_prepared.jsonl": hashlib.sha256(run.files["d_prepared.jsonl"]).hexdigest()
    }


def test_rows_beyond_twenty_stand_in_a_file_beside(tmp_path):
    run = execute(tmp_path, {"d.jsonl": ROWS + pairs(FACTS[0]) * 30})
    finding = run.finding("duplicate")
    assert (finding["rows"], finding["count"]) == (list(range(4, 24)), 30)
    beside = json.loads(run.files[finding["rows_file"]])
    assert beside["findings"]["duplicate"] == list(range(4, 34))
    assert run.report["changes"]["count"] == len(beside["changes"]) == 33


def test_the_log_names_what_became_of_each_changed_row(tmp_path):
    rows = [
        ("What is a fen? ->", " A wet meadow\n"),
        ("Name a berry ->", "rowan\n"),
        ("Who? ->", ""),
        ("x ->", "y\n"),
    ]
    run = execute(tmp_path, {"d.jsonl": pairs(*rows)})
    assert run.report["changes"] == {
        "count": 3,
        "rows": [
            {"row": 2, "changed": ["leading_space"]},
            {"row": 4, "changed": ["leading_space"]},
            {"row": 3, "dropped": "empty_completion"},
        ],
        "rows_file": None,
    }


def test_a_second_run_has_nothing_to_do(tmp_path):
    first = execute(tmp_path, {"d.jsonl": CLASSES})
    again = execute(tmp_path, {"d.jsonl": CLASSES})
    assert (again.exit, again.files, again.report) == (0, {}, first.report)
    asked = execute(tmp_path, {"d.jsonl": CLASSES}, answers=[])
    assert (asked.exit, asked.files) == (0, {})


def test_under_strict_a_second_run_ends_as_the_first_and_one_on_its_output_is_done(tmp_path):
    """The findings of the report are about the rows that were read, not about those that were written."""
    first = execute(tmp_path, {"d.jsonl": ROWS}, "--strict")
    again = execute(tmp_path, {"d.jsonl": ROWS}, "--strict")
    assert (first.exit, again.exit, again.files) == (3, 3, {})
    written = (tmp_path / "d_prepared.jsonl").read_text()
    assert execute(tmp_path, {"d_prepared.jsonl": written}, "--strict").exit == 0


def test_a_run_whose_data_are_gone_is_made_again(tmp_path):
    execute(tmp_path, {"d.jsonl": ROWS})
    (tmp_path / "d_prepared.jsonl").unlink()
    assert len(execute(tmp_path, {"d.jsonl": ROWS}).records) == 3


def test_what_a_run_has_written_is_prepared(tmp_path):
    execute(tmp_path, {"d.jsonl": CLASSES})
    train = (tmp_path / "d_prepared_train.jsonl").read_text()
    assert execute(tmp_path, {"d_prepared_train.jsonl": train}).files == {}


def test_other_options_are_another_run(tmp_path):
    execute(tmp_path, {"d.jsonl": ROWS})
    run = execute(tmp_path, {"d.jsonl": ROWS}, "--ending", "eos")
    assert list(run.data) == ["d_prepared (1).jsonl"]


def test_another_programs_report_is_no_obstacle(tmp_path):
    run = execute(tmp_path, {"d.jsonl": ROWS, "x.report.json": "[]", "y.report.json": "\0"})
    assert len(run.records) == 3


REFUSED = ("empty_data", "identical_prompts", "identical_completions", "single_class")
TEXT = st.text(st.sampled_from("aB ?\n.-#>=E"), max_size=12)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_prepared_rows_need_no_further_change(rows):
    """Fixes settle in one run, and each row is kept, dropped or rejected."""
    given_rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    before = json.dumps(given_rows)
    try:
        first = prepare(given_rows)
    except DataError as error:
        if error.code not in REFUSED:
            raise
        return
    assert json.dumps(given_rows) == before
    counts = first.report["rows"]
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values())
    once = [{key: row[key] for key in ("prompt", "completion")} for row in first.records]
    # Dropping rows and removing a prefix can change what the others share; other edits settle at once.
    removed = {"prompt_prefix", "completion_prefix"} & {each.check for each in first.actions if each.applied}
    if counts["dropped"] or removed or first.report["task"] == "classification":
        return
    try:
        second = prepare(once, task=first.report["task"])
    except DataError:
        return
    assert not {action.check for action in second.actions if action.applied} & {check.name for check in EDITS}


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    source = tmp_path / "d.jsonl"
    source.write_text(ROWS)
    prepared = prepare(source)
    link = os.link

    def raced(hidden, path):
        path.write_text("theirs")
        link(hidden, path)

    monkeypatch.setattr(publish.os, "link", raced)
    with pytest.raises(DataError) as caught:
        prepared.write()
    assert caught.value.code == "not_written"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "d.jsonl": ROWS,
        "d_prepared.jsonl": "theirs",
    }


@pytest.mark.parametrize("failing", ["fsync", "link"])
def test_a_failure_leaves_nothing_behind_and_a_retry_works(tmp_path, monkeypatch, failing):
    source = tmp_path / "d.jsonl"
    source.write_text(CLASSES)
    prepared = prepare(source)
    real, calls = getattr(os, failing), []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise (FileExistsError if failing == "link" else OSError)(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(publish.os, failing, second_fails)
        with pytest.raises(DataError) as caught:
            prepared.write()
    assert caught.value.code == "not_written"
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]
    assert len(prepared.write()) == 3


def test_a_file_system_without_links_gets_whole_files_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(publish.os, "link", no_links)
    run = execute(tmp_path, {"d.jsonl": ROWS})
    assert len(run.records) == 3


def test_several_files_are_checked_together_and_written_apart(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_text(ROWS)
    two.write_text("prompt,completion\nwhat is a FEN,a wet meadow\nNew thing,other words\n")
    prepared = prepare([one, two])
    names = {path.name for path in prepared.write()}
    assert names == {"one_prepared.jsonl", "two_prepared.jsonl", "one_prepared.report.json"}
    assert prepared.report["outputs"] == {"one_prepared.jsonl": 3, "two_prepared.jsonl": 2}
    (leak,) = (each for each in prepared.report["findings"] if each["check"] == "leakage")
    assert leak["data"]["clusters"] == [["one.jsonl:1", "two.csv:2"]]
    assert prepared.report["split"] is None


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("d.jsonl", "d.csv"):
        (tmp_path / name).write_text(ROWS if name == "d.jsonl" else "prompt,completion\na,b\n")
    with pytest.raises(ConfigError, match="different names"):
        prepare([tmp_path / "d.jsonl", tmp_path / "d.csv"]).write()


# --- in Python -----------------------------------------------------------------------------------

DICTS = [{"prompt": prompt, "completion": completion} for prompt, completion in FACTS]


@pytest.mark.parametrize("make", [list, Dataset.from_list, pd.DataFrame])
def test_rows_in_memory_are_prepared_too(tmp_path, make):
    prepared = prepare(make(DICTS))
    assert [row["prompt"] for row in prepared.records] == [f"{row['prompt']} ->" for row in DICTS]
    (data, report) = prepared.write(tmp_path)
    assert load_records(data)["completion"] == prepared.records["completion"]
    assert json.loads(report.read_text()) == prepared.report


def test_rows_in_memory_have_no_place_of_their_own():
    with pytest.raises(ConfigError, match="folder"):
        prepare(DICTS).write()


def test_records_know_where_they_come_from(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text(pairs(("gone", "")) + ROWS)
    assert prepare(source).records["_source"] == [f"{source}:{row}" for row in (2, 3, 4)]
    assert prepare(load_records(source, format="rows").select([1])).records["_source"] == [f"{source}:2"]


def test_sides_of_a_split_are_data_sets_too(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text(CLASSES)
    prepared = prepare(source)
    train, valid, _, _ = (*prepared.write(), None)[:4]
    assert load_records(train)["prompt"] == prepared.train["prompt"]
    assert load_records(valid)["prompt"] == prepared.valid["prompt"]
    assert prepare(DICTS).train is None


def test_actions_and_words():
    prepared = prepare(DICTS, fixes={"leading_space": False})
    actions = {action.check: action for action in prepared.actions}
    assert actions["prompt_separator"].params == {"append": " ->"}
    assert (actions["leading_space"].applied, actions["leading_space"].default) == (False, "on")
    assert "3 rows, conditional" in str(prepared)


def test_a_function_decides():
    asked = []
    prepared = prepare(DICTS, accept=lambda question: not asked.append(question))
    assert len(asked) == 3
    assert all(action.applied for action in prepared.actions)
    assert not prepare([DICTS[0], DICTS[1]], accept="none").records["prompt"][0].endswith("->")


def test_chats_come_back_in_canonical_form():
    chat = {
        "messages": [{"role": "user", "content": "A riddle?"}, {"role": "assistant", "content": "An answer"}]
    }
    prepared = prepare([chat, chat])
    assert prepared.records["messages"][0][1]["content"] == "An answer"
    assert len(prepared.records) == 1


@pytest.mark.parametrize(
    "options", [{"accept": "all"}, {"sheet": "x"}, {"task": "poetry"}, {"fixes": {"x": True}}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError):
        prepare(DICTS, **options)


def test_a_source_of_no_known_kind_is_refused():
    with pytest.raises(ConfigError, match="int"):
        prepare(3)


@pytest.mark.slow
def test_the_command_gives_the_same_bytes_under_any_hash_seed(tmp_path):
    """The split and all reports depend on the data alone."""
    rows = [
        {"prompt": f"Item {k // 2}", "completion": ("yes", "no")[k % 2], "who": k // 5} for k in range(60)
    ]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.jsonl").write_text(lines(rows))
    command = [sys.executable, "-m", "ftlib", "prepare", str(tmp_path / "there" / "d.jsonl"), "-q"]
    seeded = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([*command, "--group", "who"], env=seeded, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prepare(tmp_path / "here" / "d.jsonl", group="who").write()
    made = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there")
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 5


def test_checks_share_their_passes_over_the_rows(tmp_path, monkeypatch):
    """One each: the edited prompts, the edited completions, what is in the rows, near-duplicates, writing."""
    passes, rows = [], Spool.rows

    def counted(self, kept):
        passes.append(1)
        return rows(self, kept)

    monkeypatch.setattr(Spool, "rows", counted)
    run = execute(tmp_path, {"d.jsonl": pairs(*((f"Name {k}", f"{k} said so") for k in range(30)))})
    assert run.applied == ["prompt_separator", "completion_ending", "leading_space"]
    assert len(passes) == 5
