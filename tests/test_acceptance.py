"""What reward models (R), preference losses (D) and PPO (P) must show, each named in a docstring."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

WANTED = [
    f"{letter}{number}" for letter, last in {"R": 5, "D": 6, "P": 24}.items() for number in range(1, last + 1)
]


@pytest.fixture(scope="module")
def shown() -> set[str]:
    """The names at the start of docstrings: "R4: ...", "P6, P8: ..."."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.lower().startswith("test"):
                head = re.match(r"[A-Z]\d+(?:(?:, | and )[A-Z]\d+)*", ast.get_docstring(node) or "")
                found.update(re.findall(r"[A-Z]\d+", head.group() if head else ""))
    return found


@pytest.mark.parametrize("name", WANTED)
def test_it_is_shown_by_a_test(name: str, shown: set[str]) -> None:
    assert name in shown
