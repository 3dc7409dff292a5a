from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import Conversation, Encoder, Segment, Segments, formatters, load_records
from ftlib.data.segments import Skipped
from ftlib.data.transforms import mix, template
from ftlib.errors import DataError
from tests.data.tokenizers_zoo import tiny

WORDS = st.text(alphabet="abcdefg \n.é", min_size=1, max_size=12)
PAIRS = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(4)]
SHAPED = formatters.prompt_completion(separator=" ->", ending=" END")
CHATS = [
    {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}]}
    for i in range(3)
]


def segments(*parts, **options):
    return lambda row: Segments(parts, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_the_result_encodes_as_the_formatter_does(pairs):
    rows = load_records([{"prompt": p, "completion": c} for p, c in pairs if c.strip()] or PAIRS)
    written, report = template(rows, SHAPED)
    assert Encoder(tiny())(written)[:] == Encoder(tiny(), formatter=SHAPED)(rows)[:]
    assert report.rows == report.kept == len(written)


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_conversations_become_messages_with_their_system_text(system):
    formatter = formatters.chat(system=system)
    written = template(load_records(CHATS), formatter).records
    assert Encoder(tiny())(written)[:] == Encoder(tiny(), formatter=formatter)(load_records(CHATS))[:]
    assert [turn["role"] for turn in written[0]["messages"]][-2:] == ["user", "assistant"]


def test_prompts_of_messages_and_their_tools_stay_apart():
    asked, said = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))
    rows = load_records([{"prompt": asked, "completion": said, "tools": [{"name": "f"}]}])
    row = template(rows, formatters.chat(system="s")).records[0]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
    assert [turn["role"] for turn in row["completion"]] == ["assistant"]
    assert '"name": "f"' in row["tools"]
    alone = template(load_records([{"prompt": asked}]), formatters.chat()).records
    assert set(alone.column_names) == {"prompt", "_source"}


def test_sources_of_different_forms_become_one():
    written = template(load_records(PAIRS), SHAPED).records
    plain = template(load_records([{"text": "hello"}]), formatters.text()).records
    assert written[0] == {"prompt": "q0 ->", "completion": " a0 END", "_source": "<list>:1"}
    assert plain[0] == {"text": "hello", "_source": "<list>:1"}
    turns = load_records([{"prompt": "x", "completion": "y", "topic": "z"}])
    both = mix({"a": written, "b": template(turns, SHAPED).records}, stop="once").records
    assert both.column_names == written.column_names


def test_a_stream_gives_the_same_rows_each_time_it_is_read():
    mapped = template(load_records(PAIRS), SHAPED)
    streamed = template(load_records(PAIRS).to_iterable_dataset(), SHAPED)
    for _ in range(2):
        assert list(streamed.records) == list(mapped.records)
        assert streamed.report == mapped.report


def test_the_fingerprint_follows_what_was_written():
    made = [
        template(load_records(PAIRS), f).records._fingerprint
        for f in (SHAPED, SHAPED, formatters.prompt_completion())
    ]
    assert made[0] == made[1] != made[2]


TEXT = Segment("a", "text")


@pytest.mark.parametrize(
    ("formatter", "found"),
    [
        (segments(TEXT, Segment("b", "completion", boundary=True)), "a layout other than text"),
        (segments(Segment("a", "text", weight=0.5)), "explicit weights"),
        (segments(Segment("a", "text", control=True)), "control tokens"),
        (segments(TEXT, eos=False), "no EOS"),
        (segments(TEXT, bos=False), "no BOS"),
        (segments(TEXT, eos=False, closed=True), "an ending of the tokenizer's own"),
        (lambda row: Conversation(({"role": "user", "content": "a"},), system=""), "empty system text"),
        (formatters.preference(), "Answers"),
    ],
)
def test_layouts_that_no_columns_hold_are_refused_with_their_row(formatter, found):
    rows = load_records([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=f"^<list>:1: .*{found}"):
        template(rows, formatter)


def test_all_bad_rows_come_at_once():
    rows = load_records(PAIRS)

    def picky(row):
        if row["prompt"] in ("q1", "q3"):
            raise DataError("no good.", column="prompt")
        return SHAPED(row)

    with pytest.raises(DataError, match=r"(?s)<list>:2:prompt: no good\..*<list>:4:prompt: no good\."):
        template(rows, picky)


def test_rows_that_the_formatter_skips_are_counted_with_its_reason():
    def some(row):
        return Skipped("odd") if row["prompt"] in ("q1", "q3") else SHAPED(row)

    written, report = template(load_records(PAIRS), some)
    assert list(written["_source"]) == ["<list>:1", "<list>:3"]
    assert report.dropped == {"odd": 2}
    assert report.steps[0].examples == {"odd": ["<list>:2", "<list>:4"]}
    with pytest.raises(DataError, match="the formatter skips all"):
        template(load_records(PAIRS), lambda row: Skipped("all"))


def test_rows_of_two_kinds_are_refused():
    def either(row):
        return formatters.text("prompt")(row) if row["prompt"] == "q1" else SHAPED(row)

    with pytest.raises(DataError, match="as in the first row"):
        template(load_records(PAIRS), either)
    with pytest.raises(DataError, match="as in the first row"):
        list(template(load_records(PAIRS).to_iterable_dataset(), either).records)
