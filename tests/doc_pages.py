"""Read a Markdown page's Python blocks, run them in order, and compare what they print.

Conventions of the pages:

- blocks of one page share one namespace, as a reader would type them one after another;
- comment lines that start with `#>` show what the block prints, line by line; lines in between may be
  left out. Whole numbers must agree exactly, numbers with a decimal point within a tenth, and `...` in
  place of a number or text agrees with anything;
- a block is left out only as `python no-run`, directly after `<!-- no-run: the reason -->`.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["Block", "blocks_of", "run_page", "table_rows", "unmatched"]

TOLERANCE = 0.1  # relative; another processor rounds differently, and training amplifies it

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- no-run: \S.* -->\s*\Z")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One Python block of a page: where its code starts, the code, and the output it shows."""

    line: int
    code: str
    shown: tuple[str, ...]


def blocks_of(text: str) -> list[Block]:
    """The blocks to run. A block that is left out without a reason is an error."""
    blocks = []
    for fence in _FENCE.finditer(text):
        language, *flags = fence["info"].split() or [""]
        if language not in {"python", "py"}:
            continue
        line = text.count("\n", 0, fence.start("code")) + 1
        if flags == ["no-run"]:
            assert _REASON.search(text[: fence.start()]), (
                f"line {line}: no-run needs a reason before the block"
            )
            continue
        assert not flags, f"line {line}: unknown flags {flags}"
        shown = re.findall(r"^#> ?(.*)$", fence["code"], re.MULTILINE)
        blocks.append(Block(line, fence["code"], tuple(shown)))
    return blocks


def run_page(path: Path) -> list[str]:
    """Run the blocks of one page in the current folder and compare what each prints with what it shows.

    A failure's traceback names the page and the line in it.

    Returns:
        What each block printed.
    """
    module = ModuleType("page")
    sys.modules["page"] = module  # dataclasses look up the module of the class
    outputs = []
    try:
        for block in blocks_of(path.read_text(encoding="utf-8")):
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, module.__dict__)
            missing = unmatched(block.shown, printed.getvalue().splitlines())
            assert missing is None, (
                f"{path.name}:{block.line}: shows {missing!r}, printed:\n{printed.getvalue()}"
            )
            outputs.append(printed.getvalue())
    finally:
        del sys.modules["page"]
    return outputs


def table_rows(text: str) -> list[list[str]]:
    """The cells of every table row of a page, heads and rules left out, code marks taken off."""
    lines = text.splitlines()
    rules = {number for number, line in enumerate(lines) if re.fullmatch(r"\|(-+\|)+", line)}
    rows = [
        line
        for number, line in enumerate(lines)
        if line.startswith("|") and number not in rules and number + 1 not in rules
    ]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def unmatched(shown: tuple[str, ...], printed: list[str]) -> str | None:
    """The first shown line that none of the remaining printed lines agrees with."""
    remaining = iter(printed)
    for line in shown:
        if not any(_agrees(line, candidate) for candidate in remaining):
            return line
    return None


def _agrees(shown: str, printed: str) -> bool:
    pattern, numbers, end = "", [], 0
    for token in re.finditer(rf"\.\.\.|{_NUMBER.pattern}", shown):
        pattern += re.escape(shown[end : token.start()])
        end = token.end()
        if token[0] == "...":
            pattern += ".*?"
        else:
            pattern += f"({_NUMBER.pattern})"
            numbers.append(token[0])
    match = re.fullmatch(pattern + re.escape(shown[end:]), printed.rstrip())
    return match is not None and all(map(_close, numbers, match.groups()))


def _close(shown: str, printed: str) -> bool:
    if "." not in shown and "e" not in shown:
        return shown == printed
    expected, found = float(shown.replace(",", "")), float(printed.replace(",", ""))
    return abs(found - expected) <= TOLERANCE * abs(expected)
