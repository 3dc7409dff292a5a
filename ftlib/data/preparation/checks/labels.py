"""Checks of class labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from ftlib.data.preparation.check import Check, Context, Finding
from ftlib.data.preparation.words import counted
from ftlib.errors import ConfigError

__all__ = ["CLASS_IMBALANCE", "LABEL_TOKENS", "LABEL_VARIANT", "RARE_CLASS", "check_positive_class"]

_RARE = 10
_IMBALANCE = 10


def labels_of(context: Context) -> Counter[str]:
    """Rows of each label, by label."""
    table = context.table
    if "labels" not in table.scans:
        table.scans["labels"] = Counter(row.completion for row in table.rows())
    counts: Counter[str] = table.scans["labels"]
    return Counter({label: counts[label] for label in sorted(counts)})


def _classes(context: Context) -> Counter[str]:
    return labels_of(context) if context.task == "classification" else Counter()


def _label_variant(context: Context) -> Iterator[Finding]:
    variants: dict[str, list[str]] = defaultdict(list)
    counts = _classes(context)
    for label in counts:
        variants[label.strip().casefold()].append(label)
    found = [labels for labels in variants.values() if len(labels) > 1]
    if found:
        yield Finding(
            f"{counted(len(found), 'label')} in several spellings: {found}",
            count=len(found),
            data={"labels": found, "counts": {label: counts[label] for group in found for label in group}},
        )


def _rare_class(context: Context) -> Iterator[Finding]:
    rare = {label: count for label, count in _classes(context).items() if count < _RARE}
    if rare:
        yield Finding(
            f"{counted(len(rare), 'class', 'classes')} of fewer than {_RARE} rows",
            count=len(rare),
            data={"labels": rare},
        )


def _class_imbalance(context: Context) -> Iterator[Finding]:
    counts = _classes(context)
    if not counts:
        return
    largest, smallest = max(counts.values()), min(counts.values())
    if largest > _IMBALANCE * smallest:
        yield Finding(
            f"the largest class has {counted(largest, 'row')}, the smallest {smallest:,}",
            count=len(counts),
            data={"largest": largest, "smallest": smallest, "labels": dict(counts)},
        )


def _label_tokens(context: Context) -> Iterator[Finding]:
    counter = context.settings.counter
    unit = "words" if counter is None else "tokens"
    pieces: dict[str, list[object]] = {
        label: list(label.split() if counter is None else counter.ids(label)) for label in _classes(context)
    }
    several = [label for label, parts in pieces.items() if len(parts) > 1]
    by_first: dict[object, list[str]] = defaultdict(list)
    for label, parts in pieces.items():
        by_first[parts[0] if parts else None].append(label)
    shared = [labels for labels in by_first.values() if len(labels) > 1]
    if several or shared:
        yield Finding(
            f"{counted(len(several), 'label')} of several {unit}, {counted(len(shared), 'group')} of labels "
            "that share their first",
            count=len({*several, *(label for labels in shared for label in labels)}),
            data={"unit": unit, "several": several, "shared_first": shared},
        )


def check_positive_class(context: Context) -> None:
    """Refuse a positive class that is no label."""
    wanted = context.settings.positive_class
    if wanted is None:
        return
    labels = [label.strip() for label in _classes(context)]
    if not labels:
        raise ConfigError(
            "prepare: positive_class has no effect here: the data are no classification. Leave it out."
        )
    if wanted.strip() not in labels:
        raise ConfigError(f"prepare: expected positive_class as one of {labels}, got {wanted!r}.")


LABEL_VARIANT = Check(
    "label_variant", "labels that are equal after trimming and casefolding", _label_variant, added=True
)
RARE_CLASS = Check("rare_class", "a class of fewer than 10 rows", _rare_class, added=True)
CLASS_IMBALANCE = Check(
    "class_imbalance", "the largest class has more than 10 times the rows of the smallest", _class_imbalance,
    added=True,
)  # fmt: skip
LABEL_TOKENS = Check(
    "label_tokens",
    "a label of several tokens, or labels that share their first token (words, without a tokenizer)",
    _label_tokens,
    added=True,
)
