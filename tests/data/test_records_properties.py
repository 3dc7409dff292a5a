"""Whatever the rows hold, they become records, or an error of ours that names them."""

from __future__ import annotations

from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlib.data import Encoder, load_records
from ftlib.data.formats import BY_NAME, RULES
from ftlib.errors import DataError
from tests.data.tokenizers_zoo import tiny

LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["user", "assistant"]),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.one_of(LEAF, st.sampled_from(["user", "assistant", "system", "tool"]))},
    optional={
        "content": st.one_of(LEAF, st.lists(st.fixed_dictionaries({"text": LEAF}), max_size=2)),
        "weight": LEAF,
        "tool_calls": st.one_of(LEAF, st.lists(LEAF, max_size=2)),
        "extra": LEAF,
        "name": LEAF,
    },
)
VALUE = st.recursive(
    st.one_of(LEAF, st.lists(MESSAGE, max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
COLUMNS = st.sampled_from(
    [
        *("text", "prompt", "completion", "messages", "tools", "_source", "other", "extra_text"),
        *("chosen", "rejected", "margin", "answers", "ranks", "scores", "input", "rejected_response"),
    ]
)
FORMATS = ["auto", "rows", *(rule.name for rule in (*RULES, *BY_NAME))]
NO_PATH = LEAF.filter(lambda value: not isinstance(value, str))  # a list of strings is a list of files
ROWS = st.lists(st.one_of(NO_PATH, st.dictionaries(COLUMNS, VALUE, max_size=4)), max_size=4)


@cache
def encoder():
    return Encoder(tiny())


@given(rows=ROWS, name=st.sampled_from(FORMATS))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_become_records_or_one_error(rows, name):
    try:
        records = load_records(rows, format=name)
    except DataError as error:
        records, place = None, str(error)
    if records is None:
        assert place.startswith(("<list>", "expected rows, got none"))
    else:
        assert len(records) == len(rows)


@given(
    rows=st.lists(st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=4)}), min_size=1)
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_conversations_are_encoded_or_refused(rows):
    try:
        examples = encoder().preview(rows, n=len(rows)).rows
    except DataError:
        examples = ()
    assert all(any(weight > 0 for weight in example.weights) for example in examples)


SIDE = st.one_of(LEAF, st.lists(MESSAGE, max_size=2), st.sampled_from(["a b", "a c"]))
NUMBERS = st.one_of(LEAF, st.lists(st.one_of(LEAF, st.integers(1, 3)), max_size=3))


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "prompt": SIDE,
                "chosen": SIDE,
                "rejected": SIDE,
                "margin": LEAF,
                "answers": st.lists(SIDE, max_size=3),
                "ranks": NUMBERS,
                "scores": NUMBERS,
            },
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_comparisons_are_encoded_or_refused(rows):
    try:
        examples = encoder().preview(rows, n=len(rows)).rows
    except DataError:
        examples = ()
    assert all(any(weight > 0 for weight in example.weights) for example in examples)
