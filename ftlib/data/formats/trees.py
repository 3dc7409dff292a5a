"""Conversation trees: one message per row, each naming the message it answers (OASST).

By default a tree gives one conversation, which follows the best ranked reply at every turn. With
``outputs="all"`` every path to a last answer is a conversation; an answer that several of them share is
learned in the first, and weighs 0 in the others.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data.cells import has
from ftlib.data.formats.chats import MESSAGES
from ftlib.data.formats.rule import FormatOptions, Gathered, Rule
from ftlib.data.messages import role_of
from ftlib.data.problems import describe
from ftlib.data.reading import Located
from ftlib.data.segments import Row
from ftlib.errors import DataError

__all__ = ["TREES"]

_NEEDED = ("message_id", "role", "text")
Line = list[Located]  # a message with all it answers, the first one first


def _gather(rows: Sequence[Located], options: FormatOptions) -> Gathered:
    # Reversed, so that of two messages with one id the first has it.
    by_id = {_row(row)["message_id"]: row for row in reversed(rows) if has(_row(row), *_NEEDED)}
    lines: list[Line] = []
    made: list[Located] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        try:
            line = _line(row, by_id)
        except DataError as error:
            made.append(Located(row.place, error))
            continue
        if any(_row(each).get("deleted") is True for each in line):
            dropped["deleted message"] += 1
        else:
            lines.append(line)
    ends = _last_answers(lines, options) if options.outputs == "all" else _best_answers(lines, options)
    learned: set[Any] = set()
    used: set[Any] = set()
    for line in ends:
        made.append(Located(line[-1].place, {"messages": [_message(each, learned) for each in line]}))
        ids = {_row(each)["message_id"] for each in line}
        used |= ids
        learned |= ids
    unused = sum(_row(line[-1])["message_id"] not in used for line in lines)
    if unused:
        dropped["message on no path that is learned"] = unused
    places = {id(row.place): k for k, row in enumerate(rows)}
    return Gathered(sorted(made, key=lambda row: places[id(row.place)]), dropped)


def _row(located: Located) -> dict[str, Any]:
    return {} if isinstance(located.value, DataError) else located.value


def _parent(located: Located) -> Any:
    """The message that this one answers; tables leave the cell of a first message empty."""
    parent = _row(located).get("parent_id")
    return None if parent == "" else parent


def _line(row: Located, by_id: Mapping[Any, Located]) -> Line:
    """The message with all that it answers.

    Raises:
        DataError: a row that is no message, or one that is in no tree.
    """
    if isinstance(row.value, DataError):
        raise row.value
    for name in _NEEDED:
        if not has(row.value, name):
            raise row.place.error("expected text, got null.", column=name)
    if by_id[row.value["message_id"]] is not row:
        raise row.place.error(
            f"expected each id once, got {describe(row.value['message_id'])} again.", column="message_id"
        )
    line = [row]
    while (parent := _parent(line[0])) is not None:
        if parent not in by_id or len(line) > len(by_id):
            cause = "a circle of answers" if parent in by_id else f"{describe(parent)}, which no row has"
            raise row.place.error(
                f"expected the ids of other messages up to one that answers none, got {cause}.",
                column="parent_id",
            )
        line.insert(0, by_id[parent])
    return line


def _last_answers(lines: Sequence[Line], options: FormatOptions) -> list[Line]:
    """The lines that end in an answer which no other answer follows."""
    answers = [line for line in lines if role_of(_row(line[-1]), options.roles) == "assistant"]
    followed = {_row(each)["message_id"] for line in answers for each in line[:-1]}
    return [line for line in answers if _row(line[-1])["message_id"] not in followed]


def _best_answers(lines: Sequence[Line], options: FormatOptions) -> list[Line]:
    """One line per tree, along the best ranked replies, to the last answer on it."""
    replies: dict[Any, list[Line]] = defaultdict(list)
    for line in lines:
        replies[_parent(line[-1])].append(line)
    best = []
    for root in replies[None]:
        end, answer = root, None
        while True:
            if role_of(_row(end[-1]), options.roles) == "assistant":
                answer = end
            following = replies[_row(end[-1])["message_id"]]
            if not following:
                break
            end = min(following, key=lambda line: _rank(_row(line[-1])))  # of equals the first
        if answer is not None:
            best.append(answer)
    return best


def _rank(row: Row) -> float:
    rank = row.get("rank")
    return float(rank) if isinstance(rank, int | float) else math.inf


def _message(located: Located, learned: set[Any]) -> dict[str, Any]:
    row = _row(located)
    message = {"role": row["role"], "content": row["text"]}
    return {**message, "weight": 0} if row["message_id"] in learned else message


TREES = Rule(
    "trees",
    "message_id + parent_id + role + text, one message per row",
    "OASST",
    ("messages",),
    _NEEDED,
    lambda row: has(row, *_NEEDED),
    MESSAGES.convert,
    lambda _: ("messages",),
    _NEEDED,
    obeys=("outputs",),
    gather=_gather,
)
