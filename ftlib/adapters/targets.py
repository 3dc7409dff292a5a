"""Which modules of a model an adapter names, checked before peft looks for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from torch import nn

from ftlib.checks import TEXT, Wanted, listed
from ftlib.errors import ConfigError

__all__ = ["MODULES", "require_modules", "targets_or"]

logger = logging.getLogger(__name__)
SHOWN = 12  # names of modules in an error


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return bool(value)


MODULES = listed("names of modules", TEXT.holds, least=1)


def targets_or(word: str) -> Wanted:
    """What an adapter is put on: a word of its own, names of modules, or a regular expression."""
    return Wanted(
        f"{word!r}, a list of names of modules, or one regular expression",
        lambda value: _is_pattern(value) if isinstance(value, str) else MODULES.holds(value),
    )


def require_modules(config: PeftConfig, model: nn.Module, *, strict: bool) -> None:
    """Every module that a configuration names must be there: peft leaves out those it does not find.

    Args:
        config: of any kind; names only are looked for, not words like "all-linear".
        model: the whole of it.
        strict: refuse the first name without a module; else one of several is enough, as in configurations
            that list the names of many architectures, and the others are logged.

    Raises:
        ConfigError: names without a module.
    """
    there = [name for name, _ in model.named_modules() if name]
    for field in ("target_modules", "modules_to_save"):
        named = getattr(config, field, None)
        if not named or named == "all-linear":
            continue
        if isinstance(named, str):
            missing = [] if any(re.fullmatch(named, name) for name in there) else [named]
        else:
            missing = [one for one in sorted(named) if not _found(one, there)]
        if missing and (strict or isinstance(named, str) or len(missing) == len(named)):
            raise ConfigError(
                f"attach: {field}: expected modules of {type(model).__name__}, found none for {missing}. "
                f"There are {_last_names(there)}."
            )
        if missing:
            logger.warning("attach: %s: no module of the model is called %s.", field, " or ".join(missing))


def _found(named: str, there: Iterable[str]) -> bool:
    return any(name == named or name.endswith(f".{named}") for name in there)


def _last_names(there: Iterable[str]) -> str:
    """What modules are called in their parents, numbers aside; the first few."""
    names = list(dict.fromkeys(last for name in there if not (last := name.rsplit(".")[-1]).isdigit()))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
