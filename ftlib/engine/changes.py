"""What differs between the configuration of a checkpoint and the present one, as a table for people."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.errors import CheckpointError, ConfigError

__all__ = ["differences", "refuse_changes"]

_CELL = 48  # characters of a value shown


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """A table of every option whose value changed; empty when nothing did.

    Args:
        saved: configuration as the manifest holds it; nested mappings become dotted names.
        current: configuration of this run. Tuples equal the lists that JSON made of them.

    Returns:
        Lines of ``option  checkpoint  now``, one per difference, under a heading; ``""`` for none.

    Example:
        >>> print(differences({"seed": 0, "betas": [0.9, 0.99]}, {"seed": 1, "betas": (0.9, 0.99)}))
        option  checkpoint  now
        seed    0           1
    """
    return _table(_changed(saved, current))


def refuse_changes(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    allow_changes: Sequence[str] = (),
    where: str = "resume",
) -> None:
    """Let a run go on from a checkpoint only when nothing changed but what was named.

    Args:
        saved: configuration and data fingerprint as the manifest holds them.
        current: the same of this run.
        allow_changes: dotted names that may differ; a name covers what is nested below it.
        where: what the message starts with, normally the checkpoint's path.

    Raises:
        CheckpointError: with the table of what differs and is not allowed.
        ConfigError: `allow_changes` names an option that neither side has.
    """
    known = set(_flat(saved)) | set(_flat(current))
    for name in allow_changes:
        if not any(_covers(name, option) for option in known):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ConfigError(f"allow_changes: expected names of options, got {name!r}. {hint}")
    refused = {
        option: values
        for option, values in _changed(saved, current).items()
        if not any(_covers(name, option) for name in allow_changes)
    }
    if refused:
        raise CheckpointError(
            f"{where}: expected the options the checkpoint was made with, got others.\n{_table(refused)}\n"
            f"Set them back, or accept them with allow_changes={sorted(refused)}."
        )


def _covers(name: str, option: str) -> bool:
    return option == name or option.startswith(f"{name}.")


def _changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    before, now = _flat(saved), _flat(current)
    pairs = {option: (before.get(option, "(absent)"), now.get(option, "(absent)")) for option in before | now}
    return {option: pair for option, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted name -> value as JSON, in which a tuple and its list are the same."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True, default=repr)
    return flat


def _table(changed: Mapping[str, tuple[str, str]]) -> str:
    if not changed:
        return ""
    rows = [("option", "checkpoint", "now")]
    rows += [(option, _cell(before), _cell(now)) for option, (before, now) in changed.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _cell(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
