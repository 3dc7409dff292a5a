"""The page about prepare tells of every check, option and report field what the code says."""

from __future__ import annotations

import argparse
import inspect
import re

from ftlib.data import prepare
from ftlib.data.preparation import CHECKS
from ftlib.data.preparation.command import add_arguments
from tests.conftest import ROOT
from tests.doc_pages import table_rows

PAGE = (ROOT / "docs" / "prepare.md").read_text(encoding="utf-8")


def row_of(check):
    """A check as the page shows it; a star marks those that see chats and preferences too."""
    star = "" if check.pairs_only else " *"
    default = {None: "–", "necessary": "necessary"}.get(check.default, check.default)
    return (f"`{check.name}`{star}", check.trigger, check.remedy or "–", default)


def test_the_table_of_checks_is_that_of_the_code():
    shown = [tuple(row) for row in table_rows(PAGE) if len(row) == 4]
    expected = [row_of(check) for check in CHECKS if check.name != "nothing_to_learn"]
    assert shown == [tuple(cell.replace("`", "") for cell in row) for row in expected]


def test_every_option_stands_in_the_page():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = {option for action in parser._actions for option in action.option_strings} - {
        "-h",
        "--help",
        "--quiet",
    }
    arguments = set(inspect.signature(prepare).parameters) - {"source"}
    assert not [option for option in options if f"`{option}" not in PAGE]
    assert not [name for name in arguments if not re.search(rf"`{name}=", PAGE)]


def test_every_field_of_the_report_stands_in_the_page():
    report = prepare([{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e f"}]).report
    named = set(re.findall(r"`(\w+)`", PAGE.split("| Field of the report |")[1]))
    inner = [
        report["rows"],
        report["findings"][0],
        report["actions"][0],
        report["inference"],
        report["changes"],
    ]
    assert set(report) - {"version"} <= named
    assert {key for part in inner for key in part} - {"dropped"} <= named | {"dropped"}
