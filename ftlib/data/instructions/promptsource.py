"""promptsource templates: Jinja text ``input ||| target`` from YAML files, rendered in a sandbox.

What a row holds stays data: it is never parsed as a template, and ``|||`` in it divides nothing.

Source: Bach et al. 2022. Left out: its random `choice` filter draws by seed and row here, so that equal
inputs give equal text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import yaml
from jinja2 import StrictUndefined, TemplateError, meta, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftlib.data.instructions.choice import draw, row_id
from ftlib.data.instructions.layout import Instructed
from ftlib.data.segments import Row, Segment, Skipped
from ftlib.errors import ConfigError, DataError

__all__ = ["JinjaTemplate", "Promptsource", "promptsource"]

CUT = "|||"
_PIPES = chr(0xF8FF0) * len(CUT)  # private characters that stand for ||| in data while it is rendered
_DRAWN = "drawn by seed and row"  # no name that a template could write
_LIMIT = 1_000_000  # characters of one rendered row


@final
@dataclass(frozen=True)
class JinjaTemplate:
    """One template: `text` is ``input ||| target``, `choices` its answers in Jinja, divided likewise."""

    name: str
    text: str
    choices: str | None = None

    @property
    def head(self) -> str | None:
        """The input, where it can be rendered without the target: ``|||`` stands outside of all blocks."""
        head, _, tail = self.text.partition(CUT)
        try:
            _environment().parse(head)
            _environment().parse(tail)
        except TemplateError:
            return None
        return head

    @property
    def columns(self) -> frozenset[str]:
        """The columns that the input reads."""
        return _read(self.text if self.head is None else self.head)

    @property
    def answers(self) -> frozenset[str]:
        """The columns that the target alone reads: a row that lacks one is to be answered."""
        return _read(self.text) - self.columns


@final
@dataclass(frozen=True)
class Promptsource:
    """See `promptsource`."""

    templates: tuple[JinjaTemplate, ...]
    separator: str = "\n"
    seed: int = 0

    def __call__(self, row: Row) -> Instructed | Skipped:
        """Input and target of the template that the row draws; left out where it renders fewer parts."""
        template, key = self._drawn(row)
        known = {name: _guarded(value) for name, value in row.items()}
        choices = self.choices(row)
        if choices is not None:
            known["answer_choices"] = [_guarded(choice) for choice in choices]
        head = template.head
        if head is not None and any(row.get(name) is None for name in template.answers):
            parts = [self._rendered(head, known, key)]  # to be answered
        else:
            parts = self._rendered(template.text, known, key).split(CUT)
            if len(parts) < 2 or not parts[0].strip() or not parts[1].strip():
                return Skipped("no_target")
        asked, *target = (part.strip().replace(_PIPES, CUT) for part in parts[:2])
        return Instructed(
            (Segment(asked + self.separator, "prompt"),),
            target[0] if target else None,
            ({"role": "user", "content": asked},),
        )

    def row(self, prompt: str) -> Row:
        """A bare prompt fills the one column that every template's input reads."""
        if len(self._columns) != 1:
            raise DataError(
                f"expected a row with the columns {sorted(self._columns)}, got a bare prompt. "
                "Give a dict with them."
            )
        return {next(iter(self._columns)): prompt}

    def choices(self, row: Row) -> tuple[str, ...] | None:
        """The answers this row has to choose from, for a verbalizer; None where its template lists none."""
        template, key = self._drawn(row)
        if template.choices is None:
            return None
        known = {name: _guarded(value) for name, value in row.items()}
        parts = self._rendered(template.choices, known, key).split(CUT)
        return tuple(part.strip().replace(_PIPES, CUT) for part in parts)

    @property
    def _columns(self) -> frozenset[str]:
        """The columns that inputs read."""
        return frozenset(name for each in self.templates for name in each.columns)

    def _drawn(self, row: Row) -> tuple[JinjaTemplate, str]:
        key = row_id(row, self._columns)
        return self.templates[draw(self.seed, key) % len(self.templates)], key

    def _rendered(self, text: str, known: Mapping[str, Any], key: str) -> str:
        pieces, length = [], 0
        try:
            template = _environment().from_string(text)
            for piece in template.generate({**known, "zip": zip, _DRAWN: draw(self.seed, key)}):
                length += len(piece)
                if length > _LIMIT:
                    raise SecurityError(f"more than {_LIMIT:,} characters")
                pieces.append(piece)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"promptsource: expected a row that the template can render, got {type(error).__name__}: "
                f"{error}.",
                code="template",
            ) from error
        return "".join(pieces)


def promptsource(
    source: str | Path | Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    answer_choices: str | None = None,
    separator: str = "\n",
    seed: int = 0,
) -> Promptsource:
    """Templates of promptsource.

    Args:
        source: a YAML file of the collection, as a path; the same parsed; or one template's Jinja text,
            ``input ||| target``.
        names: of the templates to use; None takes all. A row takes one by hash of seed and row id.
        answer_choices: of a template given as text: Jinja, its answers divided by ``|||``.
        separator: between input and target, part of the prompt.
        seed: of the choices.

    Raises:
        ConfigError: no such template, or one that Jinja does not parse.
    """
    if isinstance(source, str) and CUT in source:
        found: tuple[JinjaTemplate, ...] = (JinjaTemplate("text", source, answer_choices),)
    else:
        if answer_choices is not None:
            raise ConfigError("promptsource: answer_choices has no effect on a file, which brings its own.")
        found = _of_file(source)
    if names is not None:
        missing = sorted(set(names) - {template.name for template in found})
        if missing:
            raise ConfigError(
                f"promptsource: expected names among {[template.name for template in found]}, got {missing}."
            )
        found = tuple(template for template in found if template.name in names)
    for template in found:
        for text in (template.text, template.choices or ""):
            try:
                _environment().parse(text)
            except TemplateError as error:
                raise ConfigError(
                    f"promptsource: expected Jinja in the template {template.name!r}, got: {error}."
                ) from error
    return Promptsource(found, separator, seed)


class _Loader(yaml.SafeLoader):
    """Reads promptsource's two tags as plain mappings."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def _of_file(source: str | Path | Mapping[str, Any]) -> tuple[JinjaTemplate, ...]:
    if not isinstance(source, Mapping):
        try:
            text = Path(source).read_text(encoding="utf-8")
            source = _Loader(text).get_single_data()
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(
                f"promptsource: expected a YAML file, or Jinja text with {CUT}, got {str(source)!r:.80}: "
                f"{error}"
            ) from error
    listed = source.get("templates") if isinstance(source, Mapping) else None
    if not isinstance(listed, Mapping) or not listed:
        raise ConfigError("promptsource: expected `templates` in the file, found none.")
    return tuple(
        JinjaTemplate(each["name"], each["jinja"], each.get("answer_choices") or None)
        for each in listed.values()
    )


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no operator makes more text than a row may have."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(each) if isinstance(each, (str, list, tuple)) else abs(each) for each in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > _LIMIT:
            raise SecurityError(f"the template asks for {left!r:.20} {operator} {right!r:.20}")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(undefined=StrictUndefined, finalize=lambda value: "" if value is None else value)
    environment.filters["choice"] = _choice
    return environment


@pass_context
def _choice(context: Context, values: Iterable[Any]) -> Any:
    """Promptsource's random choice of promptsource, drawn by seed and row."""
    listed = list(values)
    return listed[context[_DRAWN] % len(listed)]


def _read(text: str) -> frozenset[str]:
    """The columns that some Jinja text reads."""
    return frozenset(meta.find_undeclared_variables(_environment().parse(text)) - {"answer_choices", "zip"})


def _guarded(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(CUT, _PIPES)
    if isinstance(value, Mapping):
        return {name: _guarded(item) for name, item in value.items()}
    return [_guarded(item) for item in value] if isinstance(value, (list, tuple)) else value
