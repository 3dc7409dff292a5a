r"""Comparisons in canonical columns: pairs as `[prompt,] chosen, rejected[, margin]`, several ranked answers
as `prompt, answers[, ranks | scores]`. Which columns these come from is told in `ftlib.data.spellings`.

A prompt that stands inside both sides is taken out where messages or the ``\n\nAssistant:`` of dialogues
show its end; plain strings without a prompt stay whole, and the encoder shares their common tokens.

Left out: `margin` is never made of other columns such as `score_chosen` and `score_rejected`, because it
changes the loss; compute it where it is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

from ftlib.data import cells
from ftlib.data.cells import Roles, has
from ftlib.data.messages import is_message, is_message_list
from ftlib.data.problems import describe
from ftlib.data.spellings import (
    NUMBERS,
    TEXTS,
    PairColumns,
    RankedColumns,
    are_objects,
    is_request,
    pair_columns,
    prompt_columns,
    ranked_columns,
)
from ftlib.errors import DataError

__all__ = ["canonical_pair", "canonical_ranked", "leading", "ranks_of"]

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # turns of dialogues written as text

Side = str | list[dict[str, Any]]
Item = TypeVar("Item")


# --- pairs ---


def canonical_pair(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    """`[prompt,] chosen, rejected[, margin][, tools]` of a pair; canonical once, canonical twice: the same.

    Raises:
        DataError: a side that is missing or empty; ``identical_answers``; ``prompts_differ``: whole
            conversations without a common beginning, or one that does not end where an answer starts.
    """
    where = pair_columns(row)
    prompt = _prompt(row, roles) if where.prompt else None
    chosen, rejected = (_side(row.get(name), name, roles) for name in (where.chosen, where.rejected))
    if where.chosen == "messages":
        chosen = cells.messages(row["messages"], "messages", roles)
        rejected = _in_place_of_the_last(rejected, chosen)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(
            f"expected {where.chosen} and {where.rejected} both as text or both as messages, "
            "got one of each.",
            column=where.rejected,
        )
    if chosen == rejected:
        raise _identical(f"{where.chosen} and {where.rejected}", where.rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _conversations(prompt, chosen, rejected, where)
    elif prompt is None and _is_dialogue(chosen) and _is_dialogue(rejected):
        prompt, chosen, rejected = _dialogues(str(chosen), str(rejected), where)
    elif isinstance(prompt, list):
        chosen, rejected = ([_turn("assistant", str(side))] for side in (chosen, rejected))
    canonical: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    canonical |= {"chosen": chosen, "rejected": rejected}
    if has(row, "margin"):
        canonical["margin"] = cells.number(row["margin"], "margin", least=0)
    return _with_tools(row, canonical)


def leading(one: Sequence[Item], other: Sequence[Item]) -> list[Item]:
    """What both begin with.

    Example:
        >>> leading("that", "then")
        ['t', 'h']
    """
    return [a for a, _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))]


def _in_place_of_the_last(answer: Side, messages: list[dict[str, Any]]) -> Side:
    """A conversation with another answer at its end; one that is whole stays as it is."""
    turns = [_turn("assistant", answer)] if isinstance(answer, str) else answer
    return [*messages[:-1], *turns] if turns[0]["role"] == "assistant" else turns


def _conversations(
    prompt: Side | None, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], where: PairColumns
) -> tuple[Side, Side, Side]:
    """Prompt and answers of two message lists: answers alone, or whole conversations."""
    starts = (chosen[0]["role"], rejected[0]["role"])
    if isinstance(prompt, str) and starts == ("assistant", "assistant"):
        return [_turn("user", prompt)], chosen, rejected
    if isinstance(prompt, list):
        count = len(prompt)
        repeats = [side[:count] == prompt for side in (chosen, rejected)]
        if not any(repeats):
            return prompt, chosen, rejected
        if not all(repeats):
            raise _differ("one side repeats the prompt, the other does not", where)
    else:
        count = len(leading(chosen, rejected))
        if not count:
            raise _differ("the first messages differ already", where)
        if isinstance(prompt, str) and prompt.strip() not in [m["content"].strip() for m in chosen[:count]]:
            raise _differ(f"{where.prompt[0]} is none of the messages that both begin with", where)
    answers = chosen[count:], rejected[count:]
    for name, side in zip((where.chosen, where.rejected), answers, strict=True):
        if not side or side[0]["role"] != "assistant":
            found = "nothing more" if not side else f"a message of role {side[0]['role']}"
            raise _differ(f"after {count} common messages, {name} goes on with {found}", where)
    return chosen[:count], *answers


def _is_dialogue(side: Side) -> bool:
    return isinstance(side, str) and _HUMAN in side and _ASSISTANT in side


def _dialogues(chosen: str, rejected: str, where: PairColumns) -> tuple[str, str, str]:
    """Prompt and answers of dialogues written as text: the answer is what the last assistant turn says."""
    (prompt, one), (other_prompt, other) = (
        (side[: side.rindex(_ASSISTANT) + len(_ASSISTANT)], side[side.rindex(_ASSISTANT) + len(_ASSISTANT) :])
        for side in (chosen, rejected)
    )
    if prompt != other_prompt:
        raise _differ("the turns before the last answer differ", where)
    return prompt, cells.text(one, where.chosen), cells.text(other, where.rejected)


# --- ranked answers ---


def canonical_ranked(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    """`prompt, answers[, ranks | scores][, tools]`; without numbers, the first answer is the best.

    Raises:
        DataError: fewer than two answers, an empty one, a rank or score that is missing or no number;
            ``identical_answers``: equal answers of different rank; ``no_pair``: all ranks are equal.
    """
    where = ranked_columns(row)
    name = where.answers
    given = row.get(name)
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
        raise DataError(
            f"expected a list of at least two answers, got {describe(given)}. Remove the row, or read the "
            'prompts alone: format="prompt".',
            column=name,
            excerpt=describe(given),
        )
    if not where.prompt:
        raise DataError(f"expected prompt beside {name}, got null.", column="prompt")
    numbers = _numbers(row, given, where)
    texts = TEXTS if are_objects(given) else ()
    columns = [f"{name}[{k}]" for k in range(len(given))]
    prompt = _prompt(row, roles)
    answers = [_side(_inner(a, texts), column, roles) for a, column in zip(given, columns, strict=True)]
    as_messages = isinstance(prompt, list) or isinstance(answers[0], list)
    if as_messages:
        prompt = [_turn("user", prompt)] if isinstance(prompt, str) else prompt
        answers = [[_turn("assistant", side)] if isinstance(side, str) else side for side in answers]
    elif not all(isinstance(side, str) for side in answers):
        raise DataError("expected answers all as text or all as messages, got some of each.", column=name)
    canonical = {"prompt": prompt, "answers": answers, **numbers}
    ranks = ranks_of(canonical) or list(range(len(answers)))
    for k, answer in enumerate(answers):
        first = answers.index(answer)
        if ranks[first] != ranks[k]:
            raise _identical(f"answers {first + 1} and {k + 1} of different rank", columns[k])
    if len(set(ranks)) == 1:
        raise DataError(
            "expected answers of at least two ranks, got all equal. Remove the row: it compares nothing.",
            code="no_pair",
            column=name if are_objects(given) else next(iter(numbers)),
        )
    return _with_tools(row, canonical)


def ranks_of(canonical: Mapping[str, Any]) -> list[float] | None:
    """Rank of each answer, 1 = best; equal scores give equal ranks. `None`: their order is the rank.

    Example:
        >>> ranks_of({"scores": [2.0, 9.0, 2.0]})
        [2.0, 1.0, 2.0]
    """
    if has(canonical, "ranks"):
        return [float(rank) for rank in canonical["ranks"]]
    if has(canonical, "scores"):
        best_first = sorted(set(canonical["scores"]), reverse=True)
        return [1.0 + best_first.index(score) for score in canonical["scores"]]
    return None


def _numbers(row: Mapping[str, Any], answers: Sequence[Any], where: RankedColumns) -> dict[str, list[float]]:
    """`ranks` or `scores` of the answers, from a column or from the answers themselves."""
    kind = where.numbers
    if kind is not None:
        given = row[kind]
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(answers):
            raise DataError(
                f"expected one number per answer ({len(answers)}), got {describe(given)}.",
                column=kind,
                excerpt=describe(given),
            )
        found = [(value, f"{kind}[{k}]") for k, value in enumerate(given)]
    elif are_objects(answers):
        kind, inner = next(
            (kind, spelling)
            for kind, spellings in NUMBERS.items()
            for spelling in spellings
            if any(isinstance(answer, Mapping) and has(answer, spelling) for answer in answers)
        )
        found = [
            (answer.get(inner) if isinstance(answer, Mapping) else None, f"{where.answers}[{k}].{inner}")
            for k, answer in enumerate(answers)
        ]
    else:
        return {}
    least = 1.0 if kind == "ranks" else -math.inf  # rank 1 is the best
    return {kind: [cells.number(value, column, least=least) for value, column in found]}


def _inner(answer: Any, names: Sequence[str]) -> Any:
    """What an answer says, where answers are objects."""
    if not names or not isinstance(answer, Mapping) or is_message(answer):
        return answer
    return next((answer[name] for name in names if has(answer, name)), None)


# --- parts of both ---


def _prompt(row: Mapping[str, Any], roles: Roles) -> Side:
    first, *more = prompt_columns(row)
    value = row[first]
    if is_request(value):
        value = value["messages"]
    if is_message_list(value):
        return cells.messages(value, "prompt", roles)
    asked = cells.text(value, first, empty=True)
    return "\n".join([asked, *(row[name] for name in more if row[name])])


def _side(value: Any, column: str, roles: Roles) -> Side:
    if is_message(value):
        value = [value]
    return cells.messages(value, column, roles) if is_message_list(value) else cells.text(value, column)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_tools(row: Mapping[str, Any], canonical: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(canonical.get("prompt"), list):
        return canonical
    inside = next((row[name] for name in prompt_columns(row) if is_request(row[name])), row)
    return cells.with_tools(inside, canonical)


def _identical(what: str, column: str) -> DataError:
    return DataError(
        f"expected answers that differ, got {what} equal. Remove the row: it compares nothing.",
        code="identical_answers",
        column=column,
    )


def _differ(cause: str, where: PairColumns) -> DataError:
    return DataError(
        f"expected {where.chosen} and {where.rejected} to answer one prompt: {cause}. Remove the row or "
        "correct it.",
        code="prompts_differ",
        column=where.rejected,
    )
