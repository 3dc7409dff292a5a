from __future__ import annotations

import json
import pickle

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ftlib.data import load_records
from ftlib.errors import ConfigError, DataError

PAIRS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "Ünïcode 😀", "completion": " ja\u2028wohl"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def as_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def as_csv(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")


WRITERS = {
    "a.jsonl": as_jsonl,
    "b.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "columns.json": lambda path, rows: path.write_text(
        json.dumps({name: [row[name] for row in rows] for name in rows[0]})
    ),
    "wrapped.json": lambda path, rows: path.write_text(json.dumps({"version": 1, "data": rows})),
    "lines.json": as_jsonl,
    "array.jsonl": lambda path, rows: path.write_text(json.dumps(rows)),
    "C.CSV": as_csv,
    "d.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "bom.jsonl": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode()
    ),
    "utf16.jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-16"),
    "semicolon.csv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False, sep=";"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_records(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path, PAIRS)
    records = load_records(path)
    assert records.select_columns(["prompt", "completion"]).to_list() == PAIRS
    assert all(source.startswith(f"{path}:") for source in records["_source"])


@pytest.mark.parametrize(
    "source", [PAIRS, pd.DataFrame(PAIRS), Dataset.from_list(PAIRS)], ids=["list", "frame", "dataset"]
)
def test_sources_in_memory_give_the_same_records(source):
    assert load_records(source).select_columns(["prompt", "completion"]).to_list() == PAIRS


def test_rows_are_counted_as_editors_count_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    (tmp_path / "b.csv").write_text('text,id\n"two\nlines",1\nz,2\n')
    records = load_records([tmp_path / "a.jsonl", str(tmp_path / "b.csv")])
    assert [source.rsplit(":")[-1] for source in records["_source"]] == ["2", "4", "2", "4"]
    assert records["text"][2] == "two\nlines"


def test_all_bad_rows_are_reported_at_once_with_file_row_and_column(tmp_path):
    path = tmp_path / "faq.jsonl"
    path.write_text(
        "\n".join(
            [
                '{"prompt": "a", "completion": "b"}',
                '{"prompt": "a", "completion": ""}',
                '{"prompt": "a", "completion": null}',
                '{"prompt": 5, "completion": "b"}',
                '{"prompt": "a", "completion": "b"',
                '["a", "b"]',
                '{"prompt": "a", "prompt": "c", "completion": "b"}',
                '{"prompt": "a", "completion": "\\ud800"}',
                '{"prompt": "a", "completion": "x\\u0000y"}',
                *['{"prompt": "a", "completion": "b"}'] * 9,
            ]
        )
    )
    with pytest.raises(DataError) as caught:
        load_records(path)
    lines = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in lines] == [
        f"{path}:2:completion",
        f"{path}:3:completion",
        f"{path}:4:prompt",
        f"{path}:5:34",
        f"{path}:6",
        f"{path}:7:prompt",
        f"{path}:8:completion",
        f"{path}:9:completion",
    ]
    assert lines[0].endswith(":2:completion: expected non-empty text, got ''. Remove the row or fill it in.")
    assert "got null" in lines[1]
    assert "got 5" in lines[2]
    assert "U+D800" in lines[6]
    assert "U+0000" in lines[7]
    assert (caught.value.code, caught.value.row, caught.value.column) == ("bad_row", 2, "completion")


def test_the_first_twenty_bad_rows_are_shown_and_the_rest_counted():
    rows = [{"text": "a"}] * 40 + [{"text": " "}] * 33
    with pytest.raises(DataError) as caught:
        load_records(rows)
    lines = str(caught.value).split("\n")
    assert len(lines) == 21
    assert lines[19].startswith("<list>:60:text:")
    assert lines[20] == "... and 13 more of 33 bad rows."


def test_errors_survive_pickling(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_records(tmp_path / "none.jsonl")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.code) == (type(caught.value), str(caught.value), "input_not_found")


FILES = {
    "empty.jsonl": (b"", "empty_data"),
    "header.csv": (b"prompt,completion\n", "empty_data"),
    "blank.jsonl": (b"\n\n", "empty_data"),
    "old.xls": (b"x", "unsupported_format"),
    "noextension": (b"x", "unsupported_format"),
    "cut.parquet": (b"PAR1abc", "file_corrupt"),
    "latin.jsonl": ('{"text": "caf\xe9"}\n'.encode("latin-1"), "bad_encoding"),
    "latin.csv": ("text\ncaf\xe9\n".encode("latin-1"), "bad_encoding"),
    "quote.csv": (b'prompt,completion\na,"b\n', "bad_row"),
    "wide.csv": (b"prompt,completion\na,b,c\n", "bad_row"),
    "short.csv": (b"prompt,completion\na,b\nc,d\na\n", "bad_row"),
    "twice.csv": (b"text,text\na,b\n", "duplicate_column"),
    "cut.json": (b'[{"text": "a"}, {"te', "bad_row"),
    "deep.json": (b"[" * 200_000, "bad_row"),
    "other.jsonl": (b'{"a": 1}\n', "unknown_format"),
    "alone.jsonl": (b'{"completion": "a"}\n', "missing_column"),
    "role.jsonl": (
        b'{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "unknown_role",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_have_a_code_and_name_the_file(name, tmp_path):
    content, code = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / name)
    assert caught.value.code == code
    assert str(caught.value).startswith(str(tmp_path / name))


def test_wrong_bytes_are_located(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / "a.jsonl")
    assert (caught.value.row, caught.value.byte, caught.value.excerpt) == (2, 14 + 13, "e9 22 7d 0a")


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(DataError, match="found a directory"):
        load_records(tmp_path)


def test_csv_cells_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nNA,null\n007,1.0\n")
    assert load_records(tmp_path / "a.csv")["completion"] == ["null", "1.0"]


def test_a_cell_of_ten_megabytes_is_read_and_the_csv_module_left_as_it_was(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 10_000_000)
    assert len(load_records(tmp_path / "a.csv")["text"][0]) == 10_000_000
    assert csv.field_size_limit() == before


def test_columns_are_mapped_and_what_stood_there_is_kept_aside(caplog):
    rows = [{"question": "q", "answer": "a", "prompt": "old", "text": "t", "id": 7}]
    records = load_records(rows, columns={"prompt": "question", "completion": "answer"})
    assert records[0] == {
        "prompt": "q",
        "completion": "a",
        "extra_prompt": "old",
        "extra_text": "t",
        "id": 7,
        "_source": "<list>:1",
    }
    assert "extra_text" in caplog.text


def test_an_absent_column_names_those_found():
    with pytest.raises(DataError, match=r"expected the columns \['ask'\], found \['answer', 'question'\]"):
        load_records([{"question": "q", "answer": "a"}], columns={"prompt": "ask"})
    with pytest.raises(DataError, match="expected a column 'text'") as caught:
        load_records(PAIRS, format="text")
    assert caught.value.code == "missing_column"


def test_messages_get_canonical_roles_text_and_weights():
    rows = [
        {
            "messages": [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
                },
                {"role": "human", "content": "Hi", "name": None, "train": False},
                {
                    "role": "gpt",
                    "content": None,
                    "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
                },
                {"role": "observation", "content": "1", "tool_call_id": "c"},
                {"role": "model", "content": "One", "masked": False, "mood": "calm"},
            ],
            "tools": [],
        }
    ]
    before = json.dumps(rows)
    messages = load_records(rows)[0]["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "Be kind."
    assert [message["weight"] for message in messages] == [None, 0.0, None, None, 1.0]
    assert json.loads(messages[2]["tool_calls"])[0]["function"]["arguments"] == {"x": 1}
    assert json.loads(messages[4]["extra"]) == {"mood": "calm"}
    assert json.dumps(rows) == before
    assert "tools" not in load_records(rows).column_names


def test_own_roles_can_be_named():
    rows = [{"messages": [{"role": "wizard", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert load_records(rows, roles={"wizard": "user"})[0]["messages"][0]["role"] == "user"
    with pytest.raises(ConfigError, match="expected roles to map to"):
        load_records(rows, roles={"wizard": "mage"})


def test_messages_that_end_in_a_question_become_prompts():
    assert load_records([{"messages": CHAT[:1]}])[0]["prompt"] == CHAT[:1]


def test_a_question_after_answers_makes_no_prompt_of_rows_that_others_answer():
    rows = [{"messages": CHAT}, {"messages": [*CHAT, CHAT[0]]}]
    assert load_records(rows)["messages"][1] == [*CHAT, CHAT[0]]
    assert load_records(rows[1:])[0]["prompt"] == [*CHAT, CHAT[0]]


def test_message_lists_can_be_prompt_and_completion():
    assert load_records([{"prompt": CHAT[:1], "completion": CHAT[1:]}])[0]["completion"] == CHAT[1:]
    with pytest.raises(DataError, match="both as text or both as messages"):
        load_records([{"prompt": CHAT[:1], "completion": "Hello"}])


def test_a_prompt_alone_keeps_its_other_columns():
    assert load_records([{"prompt": "a", "answer": 4}])[0] == {
        "prompt": "a",
        "answer": 4,
        "_source": "<list>:1",
    }


def test_one_row_of_another_format_is_a_bad_row_not_another_format():
    rows = [*PAIRS, {"prompt": "only"}]
    with pytest.raises(DataError, match="<list>:3:completion: expected text, got null"):
        load_records(rows)


def test_loading_twice_changes_nothing():
    once = load_records(
        [{"messages": [*CHAT[:1], {**CHAT[1], "weight": 2, "mood": "calm"}], "tools": [{"a": 1}]}]
    )
    twice = load_records(once)
    assert twice.to_list() == once.to_list()
    assert twice._fingerprint == once._fingerprint


def test_mixed_types_keep_each_value_as_it_was():
    rows = [
        {"text": "a", "v": 1, "n": 1},
        {"text": "b", "v": 2.5, "n": None},
        {"text": "c", "v": {"x": [1, "y"]}},
    ]
    records = load_records(rows)
    assert records["v"] == ["1", "2.5", '{"x": [1, "y"]}']
    assert records["n"] == [1, None, None]


def test_equal_data_have_equal_fingerprints():
    assert load_records(PAIRS)._fingerprint == load_records([dict(row) for row in PAIRS])._fingerprint
    assert load_records(PAIRS)._fingerprint != load_records(PAIRS[::-1])._fingerprint


def test_rows_as_they_are_need_no_known_columns():
    assert load_records([{"body": "a"}], format="rows")[0] == {"body": "a", "_source": "<list>:1"}


def test_options_and_sources_of_no_known_kind_are_refused():
    with pytest.raises(ConfigError, match=r"expected format as one of .*'prompt_completion'.* got 'alpaca'"):
        load_records(PAIRS, format="alpaca")
    with pytest.raises(ConfigError, match="got int"):
        load_records(5)
    with pytest.raises(DataError, match="<list>:2: expected a dict, got 'x'"):
        load_records([PAIRS[0], "x", 5])
    with pytest.raises(DataError, match="expected rows, got none"):
        load_records([])
