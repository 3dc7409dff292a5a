"""Errors: one root, the built-in each refines, and the journey through another process."""

from __future__ import annotations

import pickle

import pytest

from ftlib import errors
from ftlib.errors import DataError, FtlibError

REFINES = {
    "CapabilityError": ValueError,
    "CheckpointError": RuntimeError,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "MissingPackageError": ImportError,
    "NonFiniteError": ArithmeticError,
    "ShapeError": ValueError,
}


def test_every_public_error_is_in_the_table() -> None:
    assert set(errors.__all__) == {*REFINES, "FtlibError"}


@pytest.mark.parametrize("name", sorted(REFINES))
def test_each_error_is_ftlibs_and_the_builtin_it_refines_and_survives_pickling(name: str) -> None:
    error = getattr(errors, name)("expected, found, fix")
    assert isinstance(error, FtlibError)
    assert isinstance(error, REFINES[name])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) == "expected, found, fix"


@pytest.mark.parametrize(
    ("where", "start"),
    [
        ({}, ""),
        ({"file": "a.csv"}, "a.csv: "),
        ({"file": "a.csv", "row": 3}, "a.csv:3: "),
        ({"file": "a.csv", "row": 3, "column": "margin"}, "a.csv:3:margin: "),
        ({"file": "a.jsonl", "row": 3, "column": 17}, "a.jsonl:3:17: "),
    ],
)
def test_a_data_error_starts_with_its_place(where: dict[str, object], start: str) -> None:
    assert str(DataError("expected x, got y.", **where)) == f"{start}expected x, got y."  # type: ignore[arg-type]


def test_a_data_error_keeps_its_fields_through_pickling_and_cuts_its_excerpt() -> None:
    error = DataError("m", code="bad_utf8", file="f", row=2, column="c", byte=7, excerpt="x" * 100)
    copy = pickle.loads(pickle.dumps(error))
    fields = ("message", "code", "file", "row", "column", "byte", "excerpt")
    assert [getattr(copy, name) for name in fields] == ["m", "bad_utf8", "f", 2, "c", 7, "x" * 80]
    assert str(copy) == str(error) == "f:2:c: m"
