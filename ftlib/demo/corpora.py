"""The text that ships with Python, as training data: the language reference and the docstrings.

Two corpora, both read from the running interpreter's own installation, offline:

- `topic_records`: the language reference (`pydoc_data.topics`), for domain pre-training.
- `docstring_pairs`: what the standard library says about itself, question and answer.

Sources are parsed, never imported: importing a module may open a browser or a window, and what it
then holds depends on the platform. Left out on purpose: modules written in C, whose docstrings exist
only after an import, and private names.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from ftlib.errors import ConfigError

__all__ = ["docstring_pairs", "split_pairs", "topic_records"]

# Games and easter eggs, graphical tools, copies of the interpreter's own sources, tests: packages that a
# minimal installation lacks or that say nothing about using Python.
_LEFT_OUT = frozenset(
    {"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "tkinter", "turtledemo"}
)
_WORDS = range(3, 81)
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
# Doctests, signatures with a result, rulers and tables, list items, indented blocks.
_NOT_PROSE = re.compile(r">>>|->|[-=+|~]{3,}|^[-*+] |^\s", re.MULTILINE)
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_Documentable: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_BARE_CALL = re.compile(r"[\w.]+\(.*\)")


def topic_records(
    *, held_out: float = 0.1, max_chars: int = 2000
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The language reference as rows of text: training topics, held-out topics.

    Topics repeat each other's sections. Each paragraph is kept once, held-out topics first, so no
    paragraph of a held-out topic is trained on.

    Args:
        held_out: share of the characters to hold out, between 0 and 1. Which topics these are
            follows from a hash of their names.
        max_chars: longest row, in characters. Longer topics are cut at the ends of paragraphs, and a
            longer paragraph at the ends of its lines.

    Returns:
        Training rows and held-out rows `{"text": ...}`, in the order of the topics' names.

    Raises:
        ConfigError: a share outside [0, 1], or less than 200 characters to a row.
    """
    if max_chars < 200:
        raise ConfigError(
            f"topic_records: expected max_chars >= 200, got {max_chars}. Rows need some context."
        )
    # Importing this one module runs a dictionary literal and nothing else.
    from pydoc_data.topics import topics

    chosen = _choose({name: len(text) for name, text in topics.items()}, held_out)
    rows: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (name not in chosen, name)):
        fresh = [part for part in dict.fromkeys(_paragraphs(topics[name])) if part not in seen]
        seen.update(fresh)
        rows[name in chosen] += [{"text": text} for text in _packed(fresh, max_chars)]
    return rows[False], rows[True]


def docstring_pairs() -> list[dict[str, str]]:
    """Questions about the standard library and the first paragraph of the docstring that answers.

    Answers are plain prose of 3 to 80 words with its white space normalised. Doctests, tables, lists
    and bare signatures are left out, and of identical answers the first by name is kept.

    Returns:
        About 4,000 rows `{"prompt", "completion", "module", "name"}`, in the order of their names.
        `module` is the top-level module, `name` the full name of the module, class or function.

    Example:
        >>> next(row for row in docstring_pairs() if row["name"] == "shutil.copytree")["prompt"]
        'What does `shutil.copytree` do?'
    """
    answers: dict[str, str] = {}
    for name, docstring in _docstrings():
        answer = _first_paragraph(docstring)
        if answer is not None:
            answers.setdefault(name, answer)  # a property's setter repeats the name of its getter
    names: dict[str, str] = {}
    for name in sorted(answers):
        names.setdefault(answers[name], name)
    return [
        {
            "prompt": f"What does `{name}` do?",
            "completion": answer,
            "module": name.partition(".")[0],
            "name": name,
        }
        for answer, name in names.items()
    ]


def split_pairs(
    rows: list[dict[str, str]], *, validation: float = 0.1
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split by top-level module, so that no module of the validation rows is in the training rows.

    Args:
        rows: as `docstring_pairs` returns them.
        validation: share of the rows to hold out, between 0 and 1. Which modules these are follows
            from a hash of their names.

    Returns:
        Training rows and validation rows, each in the given order.

    Raises:
        ConfigError: a share outside [0, 1].
    """
    chosen = _choose(Counter(row["module"] for row in rows), validation)
    train = [row for row in rows if row["module"] not in chosen]
    return train, [row for row in rows if row["module"] in chosen]


def _choose(sizes: Mapping[str, int], share: float) -> set[str]:
    """Names in the order of their hashes, as many as fit into `share` of the total size."""
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"corpora: expected a held-out share between 0 and 1, got {share}.")
    room = share * sum(sizes.values())
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen


def _paragraphs(text: str) -> list[str]:
    """Paragraphs in order; the first line keeps its indentation, which carries meaning in examples."""
    return [part.strip("\n").rstrip() for part in _PARAGRAPH_END.split(text) if part.strip()]


def _packed(paragraphs: list[str], max_chars: int) -> Iterator[str]:
    """Paragraphs joined again into texts of at most `max_chars`."""
    text = ""
    for part in (piece for paragraph in paragraphs for piece in _pieces(paragraph, max_chars)):
        joined = f"{text}\n\n{part}" if text else part
        if len(joined) > max_chars:
            yield text
            joined = part
        text = joined
    if text:
        yield text


def _pieces(paragraph: str, max_chars: int) -> Iterator[str]:
    """One paragraph, cut at line ends where it is longer than `max_chars`, and inside a line if need be."""
    while len(paragraph) > max_chars:
        cut = paragraph.rfind("\n", 0, max_chars + 1)
        cut = cut if cut > 0 else max_chars
        yield paragraph[:cut]
        paragraph = paragraph[cut:].lstrip("\n")
    if paragraph:
        yield paragraph


def _docstrings() -> Iterator[tuple[str, str]]:
    """Full name and docstring of every public module, class, function and method."""
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if module.startswith("_"):
            continue
        single = library / f"{module}.py"
        for file in [single] if single.is_file() else sorted((library / module).rglob("*.py")):
            parts = [part for part in file.relative_to(library).with_suffix("").parts if part != "__init__"]
            if not any(part.startswith("_") or part in {"test", "tests"} for part in parts):
                yield from _documented(ast.parse(file.read_bytes()), ".".join(parts))


def _documented(node: _Documentable, name: str) -> Iterator[tuple[str, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring:
        yield name, docstring
    if isinstance(node, ast.Module | ast.ClassDef):  # functions inside functions have no public name
        for child in node.body:
            if isinstance(child, _DEFINITIONS) and not child.name.startswith("_"):
                yield from _documented(child, f"{name}.{child.name}")


def _first_paragraph(docstring: str) -> str | None:
    """The first paragraph in one line, or None where it is not prose of a fitting length."""
    paragraph = _PARAGRAPH_END.split(inspect.cleandoc(docstring))[0]
    text = " ".join(paragraph.split())
    if _NOT_PROSE.search(paragraph) or _BARE_CALL.fullmatch(text) or text.endswith(":"):
        return None
    return text if len(text.split()) in _WORDS else None
