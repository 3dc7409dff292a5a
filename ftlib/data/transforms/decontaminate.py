"""Training rows that hold texts of an evaluation set."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias, final

import numpy as np
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray

from ftlib.checks import SWITCH, check, number
from ftlib.data.fingerprint import identity
from ftlib.data.transforms.normalise import normalise
from ftlib.data.transforms.prompts import asked, prompt_parts, questions, texts
from ftlib.data.transforms.report import Records, Step, Transformed
from ftlib.data.transforms.rows import Row, judged, refuse_others, row_name, taken_out
from ftlib.data.transforms.shingles import Shingles, mixed, runs, word_codes
from ftlib.errors import ConfigError, DataError

__all__ = ["Evaluation", "decontaminate"]

_log = logging.getLogger(__name__)

Evaluation: TypeAlias = Dataset | IterableDataset | Iterable[str]

_LONG, _SHORT = 13, 8  # words of a run; the shorter one for evaluation texts of fewer than 13 words


def decontaminate(
    records: Records,
    evaluation: Evaluation | Mapping[str, Evaluation],
    *,
    remove: bool = False,
    share: float = 0.5,
) -> Transformed:
    """Find rows that hold an evaluation text; leave them out only on request.

    A row is contaminated by a text when at least `share` of the text's runs of 13 words stand in it; of
    texts under 13 words, runs of 8. A text under 8 words must equal a whole prompt, text or user turn of
    the row. All is compared normalised.

    Args:
        records: canonical records or a stream of them. All text of a row counts, system messages too.
        evaluation: texts; or records, of which the prompts count (of `text`, the text); or several such
            sets by name.
        remove: leave contaminated rows out. Otherwise all rows stay, and the report names them.
        share: above 0, at most 1.

    Returns:
        Records and report; its examples name each row, the evaluation text and the share found.

    Raises:
        ConfigError: a share outside (0, 1], or no sets.
        DataError: ``empty_data``: an evaluation set without texts.

    Source: Brown et al. 2020, appendix C, for runs of 13 words; the share is this library's own.
    """
    refuse_others("decontaminate", records)
    check("decontaminate", {"remove": (remove, SWITCH), "share": (share, number(above=0, most=1))})
    held_out = _HeldOut.of(evaluation if isinstance(evaluation, Mapping) else {"evaluation": evaluation})
    least = Fraction(str(share))
    step = Step("decontaminate")

    def verdict(row: Row, index: int) -> str | None:
        if index == 0:
            step.counts.update(held_out.counts)
        found = held_out.best(texts(row), questions(row), least)
        if found is None:
            return None
        number, part = found
        reason = f"contaminated by {held_out.sets[number]}"
        step.show(reason, f"{row_name(row, index)} holds {float(part):.0%} of {held_out.names[number]}")
        if remove:
            return reason
        step.counts[reason] += 1
        return None

    made = judged(records, verdict, step, (identity(held_out.identity), remove, str(share)))
    found = sum(count for name, count in step.counts.items() if name.startswith("contaminated"))
    if found:
        _log.warning(
            "decontaminate: %d of %d rows hold an evaluation text. remove=True leaves them out.",
            found,
            step.rows,
        )
    return made


@final
@dataclass(frozen=True)
class _HeldOut:
    """The runs of evaluation texts, found by binary search.

    Shapes: E texts, R different runs, P pairs of a run and a text it stands in.
    """

    sets: tuple[str, ...]  # the set of each text
    names: tuple[str, ...]  # set and number of each text, from 1 on
    totals: NDArray[np.int64]  # [E], different runs of each
    runs_R: Shingles  # ascending
    starts: NDArray[np.int64]  # [R + 1], where the texts of each run start in `owners`
    owners: NDArray[np.int64]  # [P]
    whole: Mapping[str, int]  # short text -> its number
    counts: Mapping[str, int]
    identity: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, evaluation: Mapping[str, Evaluation]) -> _HeldOut:
        if not evaluation:
            raise ConfigError("decontaminate: expected at least one evaluation set, got none.")
        named = [
            (name, f"{name}:{number}", normalise(text))
            for name, given in evaluation.items()
            for number, text in enumerate(_texts_of(given, name), start=1)
        ]
        words = [text.split() for _, _, text in named]
        sets = [_runs(codes) if len(codes) >= _SHORT else np.empty(0, np.uint64) for codes in words]
        owners = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
        together = np.concatenate(sets)
        order = np.argsort(together, kind="stable")
        different, starts = np.unique(together[order], return_index=True)
        whole: dict[str, int] = {}
        for place, (_, _, text) in enumerate(named):
            if text and len(words[place]) < _SHORT:
                whole.setdefault(text, place)
        return cls(
            sets=tuple(name for name, _, _ in named),
            names=tuple(name for _, name, _ in named),
            totals=np.array([len(each) for each in sets]),
            runs_R=different,
            starts=np.append(starts, len(order)),
            owners=owners[order],
            whole=whole,
            counts={
                "evaluation texts": len(named),
                "evaluation texts under 8 words": sum(0 < len(each) < _SHORT for each in words),
                "evaluation texts without words": sum(not each for each in words),
            },
            identity=tuple((name, text) for name, _, text in named),
        )

    def best(self, fields: list[str], asks: list[str], least: Fraction) -> tuple[int, Fraction] | None:
        """The evaluation text of which most stands in `fields`, if it is enough; of equals the first."""
        equal = [self.whole[text] for text in map(normalise, asks) if text in self.whole]
        words = normalise("\n".join(fields)).split()
        found = np.unique(np.concatenate([_runs(words, _LONG), _runs(words, _SHORT)]))
        places, ends = (np.searchsorted(self.runs_R, found, side) for side in ("left", "right"))
        places = places[places < ends]  # the same place from both sides: not among the runs
        hits = np.concatenate(
            [np.empty(0, np.int64), *(self.owners[self.starts[at] : self.starts[at + 1]] for at in places)]
        )
        numbers, counts = np.unique(hits, return_counts=True)
        parts = [
            (Fraction(int(c), int(self.totals[n])), int(n)) for n, c in zip(numbers, counts, strict=True)
        ]
        parts += [(Fraction(1), number) for number in equal]
        enough = [(part, number) for part, number in parts if part >= least]
        if not enough:
            return None
        part, number = min(enough, key=lambda found: (-found[0], found[1]))
        return number, part


def _runs(words: list[str], length: int | None = None) -> Shingles:
    """The different runs of `length` words; `None` takes 13, or 8 where there are fewer words."""
    if length is None:
        length = _LONG if len(words) >= _LONG else _SHORT
    return np.unique(mixed(runs(word_codes(words), length)))


def _texts_of(evaluation: Evaluation, name: str) -> list[str]:
    if isinstance(evaluation, str) or not isinstance(evaluation, Iterable):
        found_ = "one text" if isinstance(evaluation, str) else repr(evaluation)[:80]
        raise ConfigError(
            f"decontaminate: expected texts or records as {name}, got {found_}. Put texts in a list."
        )
    if isinstance(evaluation, (Dataset, IterableDataset)):
        rows = map(taken_out, evaluation.with_format(None))
        found = ["\n".join(text for _, text in prompt_parts(asked(row))) for row in rows]
    else:
        found = [_text(value, name) for value in evaluation]
    if not found:
        raise DataError(f"decontaminate: expected evaluation texts in {name}, got none.", code="empty_data")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(
            f"decontaminate: expected texts in {name}, got {type(value).__name__}. "
            "Load records with load_records."
        )
    return value
