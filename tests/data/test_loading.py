"""Sources of every kind, bad rows raised or skipped, and an account of every row."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import openpyxl
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ftlib.data import Encoder, load_records, load_report
from ftlib.errors import ConfigError, DataError
from tests.data.test_formats import FORMATS
from tests.data.tokenizers_zoo import tiny

GOOD = {"prompt": "a", "completion": "b"}
BAD = {"prompt": "a", "completion": ""}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WIZARD = {"messages": [{"role": "wizard", "content": "x"}, *CHAT]}


def jsonl(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def book(path, **sheets):
    made = openpyxl.Workbook()
    made.remove(made.active)
    for title, rows in sheets.items():
        sheet = made.create_sheet(title)
        for row in rows:
            sheet.append(row)
    made.save(path)
    return path


# --- sources ---


def test_cells_of_a_workbook_are_text_as_those_of_a_csv(tmp_path):
    path = book(tmp_path / "a.xlsx", S=[[" prompt", "completion "], ["2 + 2", 4], ["Wet?", True], ["x", 0.5]])
    records = load_records(path)
    assert records["completion"] == ["4", "True", "0.5"]
    assert records["_source"] == [f"{path}:S!{row}" for row in (2, 3, 4)]


def test_blank_lines_of_a_text_are_counted_and_make_no_records(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    records = load_records(tmp_path / "a.txt")
    assert records["text"] == ["one", "two"]
    assert records["_source"] == [f"{tmp_path}/a.txt:{row}" for row in (1, 3)]
    assert load_report(records).notes == {"blank_lines": 1}


def test_options_of_files_reach_the_reader_and_are_refused_in_memory(tmp_path):
    (tmp_path / "a.csv").write_bytes("caf\xe9;b\n".encode("latin-1"))
    records = load_records(tmp_path / "a.csv", encoding="latin-1", delimiter=";", header=False)
    assert records[0]["prompt"] == "café"
    path = book(tmp_path / "a.xlsx", A=[["text"], ["a"]], B=[["text"], ["b"]])
    assert load_records(path, sheet="B")["text"] == ["b"]
    assert load_records(path, sheet="all")["text"] == ["a", "b"]
    for option in ({"encoding": "utf-8"}, {"delimiter": ";"}, {"header": False}, {"sheet": "S"}):
        with pytest.raises(ConfigError, match="no effect on rows in memory"):
            load_records([GOOD], **option)


def test_numpy_values_and_class_names_become_plain():
    frame = pd.DataFrame(
        {"prompt": ["q"], "completions": [np.array(["a", "b"])], "labels": [np.array([1, 0])]}
    )
    assert load_records(frame)[0]["labels"] == [1, 0]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    assert load_records(data)["label"] == ["good", "bad"]


def test_several_files_are_one_source(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "b.csv").write_text("prompt,completion\nc,d\n")
    records = load_records([first, tmp_path / "b.csv"])
    assert records["completion"] == ["b", "d"]
    assert records["_source"] == [f"{first}:1", f"{tmp_path}/b.csv:2"]


def test_null_keys_that_arrow_adds_do_not_reach_the_records(tmp_path):
    def calls(**arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]

    data = Dataset.from_list([{"messages": calls(x=1)}, {"messages": calls(y=2)}, {"messages": CHAT}])
    data.to_parquet(tmp_path / "a.parquet")
    for source in (data, tmp_path / "a.parquet", data.to_iterable_dataset()):
        rows = list(load_records(source))
        found = [json.loads(row["messages"][1]["tool_calls"])[0] for row in rows[:2]]
        assert [call["function"]["arguments"] for call in found] == [{"x": 1}, {"y": 2}]
        assert rows[2]["messages"][1].get("tool_calls") is None


def test_polars_frames_are_read_where_polars_is_loaded(monkeypatch):
    class DataFrame:
        def iter_rows(self, *, named):
            return iter([GOOD, GOOD] if named else [])

    monkeypatch.setitem(sys.modules, "polars", SimpleNamespace(DataFrame=DataFrame))
    assert load_records(DataFrame())["_source"] == ["<frame>:1", "<frame>:2"]


def test_a_row_of_ten_megabytes_is_read(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 10_000_000}, {"text": "y"}])
    assert [len(text) for text in load_records(path)["text"]] == [10_000_000, 1]


# --- errors of a source that no rule reads ---


def test_a_missing_header_is_hinted_at(tmp_path):
    (tmp_path / "a.csv").write_text("What?,That.\nWho?,They.\n")
    with pytest.raises(DataError, match=r"found the keys .*header=False") as caught:
        load_records(tmp_path / "a.csv")
    assert caught.value.code == "unknown_format"
    assert len(load_records(tmp_path / "a.csv", header=False)) == 2
    for options in ({"columns": {"prompt": "ask"}}, {"format": "text"}):
        with pytest.raises(DataError, match="header=False") as caught:
            load_records(tmp_path / "a.csv", **options)
        assert caught.value.code == "missing_column"


def test_completions_alone_are_pointed_to_open_ended_text():
    with pytest.raises(DataError, match=r'columns=\{"text": "completion"\}') as caught:
        load_records([{"completion": "a"}])
    assert caught.value.code == "missing_column"
    assert load_records([{"completion": "a"}], columns={"text": "completion"})[0]["text"] == "a"


def test_an_unknown_format_names_the_keys_and_the_nearest_rule():
    rows = [{"text": "a"}, {"texts": "b"}, {"texts": "c"}]
    with pytest.raises(
        DataError, match=r"found the keys .*'text', 'texts'.*Nearest: 'text' \(text alone\), fitting 1 of 3"
    ):
        load_records(rows)


def test_an_unknown_format_names_the_rows_that_the_nearest_rule_does_not_fit(tmp_path):
    path = jsonl(
        tmp_path / "faq.jsonl", ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "answer": 1}']
    )
    with pytest.raises(DataError, match=r"'prompt_completion' does not fit .*faq\.jsonl:2\. Map columns"):
        load_records(path)
    rows = [{"text": "a"}, *[{"texts": "b"}] * 4]
    with pytest.raises(DataError, match="does not fit <list>:2, <list>:3, <list>:4 and 1 more"):
        load_records(rows)


def test_rows_that_cannot_be_read_are_named_beside_an_unknown_format(tmp_path):
    path = jsonl(tmp_path / "faq.jsonl", ['{"one": "a"}', '{"prompt": "a", ', '{"two": "b"}'])
    with pytest.raises(DataError, match=r"(?s)faq\.jsonl:2:.*found the keys \['one', 'two'\]"):
        load_records(path)


# --- bad rows ---


FAULTS = {  # fault -> code, line
    "null": ("bad_row", b'{"prompt": "a", "completion": null}'),
    "wrong_type": ("bad_row", b'{"prompt": "a", "completion": 5}'),
    "empty": ("bad_row", b'{"prompt": "a", "completion": ""}'),
    "nul": ("bad_row", b'{"prompt": "a\\u0000", "completion": "b"}'),
    "latin_1": ("bad_encoding", '{"prompt": "caf\xe9", "completion": "b"}'.encode("latin-1")),
    "surrogate": ("bad_row", b'{"prompt": "a\\ud800", "completion": "b"}'),
    "two_values": ("duplicate_column", b'{"prompt": "a", "prompt": "b", "completion": "c"}'),
    "cut": ("bad_row", b'{"prompt": "a", "compl'),
    "no_object": ("bad_row", b"[1, 2]"),
}


def test_faults_of_every_kind_are_named_at_once_and_skipped_as_asked(tmp_path):
    """A byte order mark and a row of ten megabytes are none."""
    long = json.dumps({"prompt": "x" * 10_000_000, "completion": "b"}).encode()
    good = json.dumps(GOOD).encode()
    path = tmp_path / "faults.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, *(line for _, line in FAULTS.values()), long, *[good] * 9])
    )
    with pytest.raises(DataError) as caught:
        load_records(path)
    assert [f"faults.jsonl:{row}:" in str(caught.value) for row in range(1, 13)] == [
        False, *[True] * len(FAULTS), False, False,
    ]  # fmt: skip
    records = load_records(path, on_error="skip", max_bad=None)
    assert [row["_source"].rpartition(":")[2] for row in records] == ["1", *map(str, range(11, 21))]
    report = load_report(records)
    assert (report.rows, report.rejected) == (20, len(FAULTS))
    written = [json.loads(line) for line in (tmp_path / "faults_rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["code"]) for row in written] == [
        (line, code) for line, (code, _) in enumerate(FAULTS.values(), start=2)
    ]


def test_skipped_rows_are_written_beside_their_file_with_place_and_reason(tmp_path):
    rows = [GOOD, BAD, '{"prompt": "a", ', *[GOOD] * 7]
    path = jsonl(tmp_path / "faq.v1.jsonl", rows)
    before = path.read_bytes()
    records = load_records(path, on_error="skip", max_bad=0.2)
    report = load_report(records)
    assert (len(records), report.rows, report.rejected) == (8, 10, 2)
    assert report.rejected_file == str(tmp_path / "faq_rejected.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "faq_rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"], entry["column"]) for entry in entries] == [
        (str(path), 2, "completion"),
        (str(path), 3, len(rows[2]) + 1),
    ]
    assert [entry["content"] for entry in entries] == [BAD, rows[2]]
    assert "expected non-empty text" in entries[0]["reason"]
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["faq.v1.jsonl", "faq_rejected.jsonl"]


def test_rejected_rows_of_an_earlier_run_are_replaced_and_files_of_others_kept(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [BAD, GOOD])
    for _ in range(2):
        load_records(path, on_error="skip", max_bad=None)
    assert len((tmp_path / "a_rejected.jsonl").read_text().splitlines()) == 1
    (tmp_path / "a_rejected.jsonl").write_text("mine")
    report = load_report(load_records(path, on_error="skip", max_bad=None))
    assert report.rejected_file == str(tmp_path / "a_rejected (1).jsonl")
    assert (tmp_path / "a_rejected.jsonl").read_text() == "mine"


def test_rejects_of_workbooks_name_their_sheet(tmp_path):
    path = book(tmp_path / "a.xlsx", First=[["text"], ["x"], [" "]])
    load_records(path, on_error="skip", max_bad=None)
    entry = json.loads((tmp_path / "a_rejected.jsonl").read_text())
    assert (entry["sheet"], entry["row"], entry["content"]) == ("First", 3, {"text": " "})


def test_rows_in_memory_are_skipped_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = load_report(load_records([GOOD, BAD], on_error="skip", max_bad=0.5))
    assert (report.rejected, report.rejected_file, list(tmp_path.iterdir())) == (1, None, [])


@pytest.mark.parametrize(("bad", "raises"), [(1, False), (2, True)])
def test_more_bad_rows_than_allowed_raise_and_write_nothing(bad, raises, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*[BAD] * bad, *[GOOD] * (100 - bad)])
    if not raises:
        assert len(load_records(path, on_error="skip")) == 99
        return
    with pytest.raises(DataError, match=r"2 of 100 rows are bad, more than max_bad=0.01") as caught:
        load_records(path, on_error="skip")
    assert (caught.value.row, caught.value.column) == (1, "completion")
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_unknown_roles_are_never_skipped(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 99 + [WIZARD])
    with pytest.raises(DataError, match=r"roles=\{'wizard'") as caught:
        load_records(path, on_error="skip", max_bad=None)
    assert (caught.value.code, caught.value.row) == ("unknown_role", 100)


def test_nothing_left_is_empty_data():
    with pytest.raises(DataError, match="got none") as caught:
        load_records([{"inputs": "a", "targets": "b", "is_correct": False}])
    assert caught.value.code == "empty_data"


@pytest.mark.parametrize("rows", [[BAD], ['{"a'], ["5"]])
def test_a_file_of_bad_rows_alone_leaves_nothing_and_writes_nothing(rows, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="rejected 1") as caught:
        load_records(path, on_error="skip", max_bad=None, format="prompt_completion")
    assert caught.value.code == "empty_data"
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("option", [{"pairs": "all"}, {"outputs": "all"}])
def test_options_that_the_format_does_not_know_are_refused(option):
    with pytest.raises(ConfigError, match="has no effect on rows read as 'prompt_completion'"):
        load_records([GOOD], **option)


def test_options_of_no_known_value_are_refused():
    for option in ({"on_error": "ignore"}, {"outputs": "some"}, {"pairs": "both"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            load_records([GOOD], **option)


# --- the account ---


def test_the_report_travels_with_the_records_and_tells_the_evidence(caplog):
    rows = [{"instruction": "q", "output": "a", "text": "t"}] * 3
    records = load_records(rows)
    report = load_report(records.select([0]))
    assert report.format == "instruction"
    assert (report.looked_at, report.fits) == (3, {"instruction": 3, "text": 3})
    assert (report.ignored, report.moved) == (("text",), ("extra_text",))
    assert "read as instruction" in caplog.text
    assert "kept aside: extra_text" in caplog.text
    assert str(report) in caplog.text


def test_data_sets_of_others_have_no_report():
    with pytest.raises(ConfigError, match="without its report"):
        load_report(Dataset.from_list([GOOD]))


def test_places_reach_the_errors_of_the_encoder(tmp_path):
    path = book(tmp_path / "a.xlsx", First=[["prompt", "completion"], ["a", "b"], ["a", "b " * 50]])
    with pytest.raises(DataError) as caught:
        Encoder(tiny(), max_length=20)(load_records(path))
    assert str(caught.value).startswith(f"{path}:First!3: expected at most 20 tokens")
    assert (caught.value.file, caught.value.sheet, caught.value.row) == (str(path), "First", 3)


# --- streams ---


def as_stream(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


def plain(value):
    """Without null keys, which data sets add to messages that lack them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


def renumbered(records, name):
    return [{**row, "_source": row["_source"].replace(name, "")} for row in plain(list(records))]


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_gives_what_the_map_gives(name):
    rows = [FORMATS[name][0][0]] * 70  # more than a batch
    stream = load_records(as_stream(rows))
    assert isinstance(stream, IterableDataset)
    assert renumbered(stream, "<stream>") == renumbered(load_records(Dataset.from_list(rows)), "<dataset>")
    assert renumbered(stream, "<stream>") == renumbered(stream, "<stream>")


def test_a_stream_is_read_no_further_than_it_has_to_be():
    read = []

    def rows():
        for k in range(100_000):
            read.append(k)
            yield {"text": f"t{k}"}

    stream = load_records(IterableDataset.from_generator(rows))
    assert len(read) <= 256 + 1
    assert next(iter(stream))["text"] == "t0"
    assert len(read) < 1000


def test_bad_rows_of_a_stream_are_raised_or_skipped_as_it_is_read(caplog):
    rows = [*[GOOD] * 300, BAD, *[GOOD] * 300]
    stream = load_records(as_stream(rows))
    with pytest.raises(DataError, match="<stream>:301:completion"):
        list(stream)
    assert len(list(load_records(as_stream(rows), on_error="skip"))) == 600
    assert "skipped <stream>:301:completion" in caplog.text
    again = load_records(as_stream([*rows, *[BAD] * 8]), on_error="skip")
    assert [len(list(again)) for _ in range(3)] == [600] * 3  # every pass counts from the start
    with pytest.raises(DataError, match="more than max_bad"):
        list(load_records(as_stream([*rows, *[BAD] * 10]), on_error="skip"))


def rejected(path):
    """(row, reason, content) of each bad row that was written down."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(entry["row"], entry["reason"], entry["content"]) for entry in entries]


def test_bad_rows_of_a_stream_are_written_where_the_user_says(tmp_path):
    file = tmp_path / "bad.jsonl"
    rows = [*[GOOD] * 300, BAD, *[GOOD] * 300, BAD]
    stream = load_records(as_stream(rows), on_error="skip", rejected_file=file)
    assert not file.exists()  # nothing is read yet
    for _ in range(2):  # a pass begins anew
        assert len(list(stream)) == 600
        (first, reason, content), (second, _, _) = rejected(file)
        assert (first, second, content) == (301, 602, BAD)
        assert "expected non-empty text" in reason
    assert len(list(load_records(as_stream([GOOD] * 3), on_error="skip", rejected_file=file))) == 3
    assert not file.exists()  # no row is bad any more


def test_workers_that_read_a_stream_write_a_file_each(tmp_path):
    rows = Dataset.from_list([GOOD, BAD, GOOD, GOOD, GOOD, BAD]).to_iterable_dataset(num_shards=2)
    stream = load_records(rows, on_error="skip", rejected_file=tmp_path / "bad.jsonl")
    assert len(list(DataLoader(stream, batch_size=None, num_workers=2))) == 4
    files = sorted(each.name for each in tmp_path.iterdir())
    assert files == ["bad_worker0.jsonl", "bad_worker1.jsonl"]
    assert [len(rejected(tmp_path / name)) for name in files] == [1, 1]


def test_bad_rows_of_any_source_are_written_where_the_user_says(tmp_path):
    file = tmp_path / "bad.jsonl"
    for source in ([GOOD, BAD], Dataset.from_list([GOOD, BAD]), jsonl(tmp_path / "a.jsonl", [GOOD, BAD])):
        report = load_report(load_records(source, on_error="skip", max_bad=None, rejected_file=file))
        assert report.rejected_file == str(file)
        assert [(row, content) for row, _, content in rejected(file)] == [(2, BAD)]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl", "bad.jsonl"]


def test_files_of_one_stem_share_their_file_of_rejected_rows(tmp_path):
    paths = [jsonl(tmp_path / name, [GOOD, BAD]) for name in ("a.jsonl", "a.v2.jsonl")]
    load_records(paths, on_error="skip", max_bad=None)
    assert len(rejected(tmp_path / "a_rejected.jsonl")) == 2


def test_a_place_for_rejected_rows_is_refused_where_it_is_of_no_use_or_taken(tmp_path):
    with pytest.raises(ConfigError, match="rejected_file has no effect with on_error='raise'"):
        load_records([GOOD], rejected_file=tmp_path / "bad.jsonl")
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="holds something else"):
        load_records([GOOD], on_error="skip", rejected_file=tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == '{"a": 1}\n'


def test_a_stream_without_rows_or_of_no_known_format_is_refused():
    with pytest.raises(DataError, match="expected rows, got none"):
        load_records(IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(DataError, match="expected rows in one of the known formats"):
        load_records(as_stream([{"a": 1}]))


def test_a_stream_of_records_can_be_encoded():
    stream = Encoder(tiny())(load_records(as_stream([{"question": "q", "answer": "a"}] * 3)))
    expected = Encoder(tiny())(load_records([{"question": "q", "answer": "a"}] * 3))
    assert [row["continuation_ids"] for row in stream] == expected["continuation_ids"][:]


# --- any rows ---

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
ROW = st.one_of(
    st.fixed_dictionaries({"inputs": TEXT, "targets": TEXT}, optional={"is_correct": st.booleans()}),
    st.fixed_dictionaries({"inputs": st.integers(), "targets": TEXT}),
    st.just({"inputs": "\ud800", "targets": "x"}),
)
RELAXED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(rows=st.lists(ROW, min_size=1, max_size=12))
@RELAXED
def test_every_row_is_a_record_dropped_or_rejected(rows):
    try:
        records = load_records(rows, format="flan", on_error="skip", max_bad=None)
    except DataError as error:
        records, code = None, error.code
    wrong = [row.get("is_correct") is False for row in rows]
    good = [
        isinstance(row["inputs"], str) and row["inputs"] != "\ud800" and bool(row["targets"].strip())
        for row in rows
    ]
    kept = [row for row, is_good, is_wrong in zip(rows, good, wrong, strict=True) if is_good and not is_wrong]
    if records is None:
        assert not kept
        assert code in ("empty_data", "missing_column")
        return
    assert [row["completion"] for row in records] == [row["targets"] for row in kept]
    report = load_report(records)
    assert report.used + sum(report.dropped.values()) + report.rejected == report.rows == len(rows)


@given(texts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=6), seed=st.randoms())
@RELAXED
def test_any_order_of_rows_gives_the_same_records_in_that_order(texts, seed):
    rows = [{"question": text, "answer": text} for text in texts]
    shuffled = rows.copy()
    seed.shuffle(shuffled)
    expected = [[message["content"] for message in row] for row in load_records(shuffled)["messages"]]
    assert expected == [[row["question"], row["answer"]] for row in shuffled]
    assert sorted(expected) == sorted([text, text] for text in texts)


@given(text=TEXT.filter(str.strip))
@RELAXED
def test_any_text_is_the_same_in_every_format(text):
    for name, column in (("text", "text"), ("content", "content")):
        assert load_records([{column: text}], format=name)["text"] == [text]
    for row in (
        {"instruction": text, "output": text},
        {"conversation": [{"human": text, "assistant": text}]},
    ):
        assert [message["content"] for message in load_records([row])[0]["messages"]] == [text, text]
