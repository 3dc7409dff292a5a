"""The template language: what each slot parses to, and where a fault is."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.data.pattern import Column, Mask, Options, Soft, Special, Words, parse
from ftlib.errors import ConfigError

SLOTS = {
    "{text_a}": Column("text_a"),
    "{ two words }": Column("two words"),
    "{x|truncate}": Column("x", (), "right"),
    "{x|truncate:left}": Column("x", (), "left"),
    "{x|lower|strip_punct}": Column("x", ("lower", "strip_punct")),
    "{x | lower | truncate}": Column("x", ("lower",), "right"),
    "{mask}": Mask(),
    "{mask:3}": Mask(3),
    "{soft:20}": Soft(20),
    '{soft:"It was"}': Soft(None, "It was"),
    '{soft: "a } b | c"}': Soft(None, "a } b | c"),
    "{soft@id:5}": Soft(5, None, "id"),
    "{options}": Options(),
    "{options:letters}": Options("letters"),
    "{special:eos}": Special("eos"),
    "{{": Words("{"),
    "}}": Words("}"),
}


@pytest.mark.parametrize(("text", "slot"), SLOTS.items())
def test_each_slot_is_what_the_table_says(text, slot):
    assert parse(text).slots == (slot,)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a {b", 5, 'expected "}"'),
        ("a } b", 3, 'expected "{" before "}"'),
        ("ab {}", 5, "expected a name"),
        ("ab {x|nope}", 7, "expected a filter"),
        ("ab {x|}", 7, "expected a filter after"),
        ("{x|truncate:middle}", 4, "truncate:left or truncate:right"),
        ("{x:3}", 2, "expected a column"),
        ("abc {mask:0}", 6, "expected a count"),
        ("abc {mask:two}", 6, "expected a count"),
        ("{mask|lower}", 7, "expected no filter on 'mask'"),
        ("{soft}", 2, "expected a count or words"),
        ("{text@id}", 2, "only {soft@id:5}"),
        ('{mask:"a"}', 2, "expected no quoted text"),
        ("{options:stars}", 2, "expected a style"),
        ("{special:end}", 2, "expected a special token"),
        ("a {b {c}", 6, 'expected "}"'),
    ],
)
def test_a_fault_is_named_with_its_column(text, column, message):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in str(caught.value)
    assert f"column {column}:" in str(caught.value)


@given(st.text())
def test_escaped_text_is_itself(text):
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert parse(escaped).slots == ((Words(text),) if text else ())


@given(st.text(alphabet='{}|:@"amsk5 '))
def test_any_text_parses_or_is_refused(text):
    with suppress(ConfigError):  # nothing else is ever raised
        assert sum(len(words.text) for words in parse(text).only(Words)) <= len(text)


def test_filters_go_from_left_to_right():
    (slot,) = parse("{x|strip|lower|capitalize|strip_punct}").slots
    assert slot.of("  HELLO There!? ") == "Hello there"
