"""What the user asked of `prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from ftlib.data.preparation.tokens import TokenCounter
from ftlib.errors import ConfigError

__all__ = ["TASKS", "Settings", "SplitMethod", "Task"]

Task = Literal["open-ended", "classification", "conditional"]
SplitMethod = Literal["stratified", "legacy"]
TASKS: tuple[Task, ...] = ("open-ended", "classification", "conditional")


@final
@dataclass(frozen=True)
class Settings:
    """The options of `prepare` that decide what comes out; see there.

    Raises:
        ConfigError: a value out of range, or options that clash.
    """

    fixes: Mapping[str, bool] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    header: bool = True
    sheet: str | None = None
    task: Task | None = None
    max_length: int = 2048
    ending: str | None = None
    split_method: SplitMethod = "stratified"
    validation: float | None = None
    group: str | None = None
    seed: int | None = None
    positive_class: str | None = None
    counter: TokenCounter | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(f"prepare: expected task as one of {list(TASKS)}, got {self.task!r}.")
        if self.split_method not in ("stratified", "legacy"):
            raise ConfigError(
                f"prepare: expected split_method as 'stratified' or 'legacy', got {self.split_method!r}."
            )
        if self.max_length < 1:
            raise ConfigError(f"prepare: expected max_length >= 1, got {self.max_length}.")
        if self.validation is not None and not 0.0 < self.validation < 1.0:
            raise ConfigError(f"prepare: expected 0 < validation < 1, got {self.validation}.")
        if self.ending == "":
            raise ConfigError(
                "prepare: expected an ending of at least one character, got ''. To append none, say 'eos'."
            )
        unused = [name for name in ("group", "seed") if getattr(self, name) is not None]
        if self.split_method == "legacy" and unused:
            raise ConfigError(
                f"prepare: {unused[0]} has no effect on the legacy split, which knows no groups and one "
                "seed. Leave it out, or take split_method='stratified'."
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data: what a second run must ask for to have nothing to do."""
        return {
            "fixes": dict(sorted(self.fixes.items())),
            "columns": dict(sorted(self.columns.items())),
            "skip_bad": self.skip_bad,
            "encoding": self.encoding,
            "delimiter": self.delimiter,
            "header": self.header,
            "sheet": self.sheet,
            "task": self.task,
            "tokenizer": None if self.counter is None else self.counter.name,
            "max_length": self.max_length,
            "ending": self.ending,
            "split_method": self.split_method,
            "validation": self.validation,
            "group": self.group,
            "seed": self.seed,
            "positive_class": self.positive_class,
        }
