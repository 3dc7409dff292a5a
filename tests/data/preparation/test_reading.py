"""What is read, in which form, and what is refused."""

from __future__ import annotations

import gzip
import io
import json

import pytest

from ftlib.data import prepare
from tests.data.preparation.harness import execute, lines, pairs

ROWS = [
    {"prompt": "Which metal is liquid at room temperature?", "completion": "Mercury"},
    {"prompt": "Name the longest bone of the body", "completion": "The femur"},
    {"prompt": "What do bees make?", "completion": "Honey and wax"},
]
TABLE = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
FINISHED = [{"prompt": f"{row['prompt']} ->", "completion": f" {row['completion']}\n"} for row in ROWS]
EDITS = ["prompt_separator", "completion_ending", "leading_space"]


def workbook(sheets):
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def parquet(rows):
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


CELLS = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
SAME_ROWS = {
    "d.csv": (TABLE, {"format": "csv", "delimiter": ","}),
    "D.CSV": (TABLE, {"format": "csv"}),
    "semicolon.csv": (TABLE.replace(",", ";"), {"delimiter": ";"}),
    "pipe.csv": (TABLE.replace(",", "|"), {"delimiter": "|"}),
    "d.tsv": (TABLE.replace(",", "\t"), {"format": "tsv", "delimiter": "\t"}),
    "d.csv.gz": (gzip.compress(TABLE.encode()), {"compression": "gz"}),
    "d.jsonl.gz": (gzip.compress(lines(ROWS).encode()), {"compression": "gz", "format": "jsonl"}),
    "d.json": (json.dumps(ROWS), {"format": "json", "shape": "array"}),
    "spread.json": (json.dumps(ROWS, indent=2), {"shape": "array"}),
    "wrapped.json": (json.dumps({"examples": ROWS}), {"shape": "list under 'examples'"}),
    "columns.json": (
        json.dumps({key: [row[key] for row in ROWS] for key in ("prompt", "completion")}),
        {"shape": "columns"},
    ),
    "indexed.json": (  # as pandas writes a frame
        json.dumps({key: {str(k): row[key] for k, row in enumerate(ROWS)} for key in ROWS[0]}),
        {"shape": "columns"},
    ),
    "lines.json": (lines(ROWS), {"format": "jsonl", "shape": "lines"}),
    "array.jsonl": (json.dumps(ROWS), {"format": "json", "shape": "array"}),
    "lines.txt": (lines(ROWS), {"format": "jsonl"}),
    "d.parquet": (parquet(ROWS), {"format": "parquet"}),
    "d.xlsx": (workbook({"Sheet": CELLS}), {"format": "xlsx"}),
    "marked.csv": (b"\xef\xbb\xbf" + TABLE.encode(), {"encoding": "utf-8"}),
    "utf16.jsonl": (b"\xff\xfe" + lines(ROWS).encode("utf-16-le"), {"encoding": "utf-16-le"}),
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_one_table_in_any_format_becomes_the_same_rows(tmp_path, name):
    content, facts = SAME_ROWS[name]
    run = execute(tmp_path, {name: content})
    assert (run.exit, run.applied) == (0, ["format", *EDITS])
    assert run.records == FINISHED
    assert facts.items() <= run.finding("format").items()
    assert run.finding("format")["level"] == "info"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_need_no_conversion(tmp_path, mark):
    run = execute(tmp_path, {"d.jsonl": mark + lines(ROWS)})
    assert run.applied == EDITS
    assert run.records == FINISHED


def test_output_is_plain_utf8_with_the_prompt_first(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("Größe /?", "ä\u2028b"), ("é", "日本"))})
    first = run.files["d_prepared.jsonl"].split(b"\n")[0]
    assert first == '{"prompt": "Größe /? ->", "completion": " ä\u2028b\\n"}'.encode()


def test_plain_lines_are_completions_without_prompts(tmp_path):
    run = execute(tmp_path, {"notes.txt": "one thing\n\n  \nanother thing"})
    assert run.report["task"] == "open-ended"
    assert run.finding("empty_completion")["rows"] == [2, 3]
    assert run.finding("empty_completion")["reasons"] == {"empty": 1, "blank": 1}
    assert run.records == [
        {"prompt": "", "completion": " one thing"},
        {"prompt": "", "completion": " another thing"},
    ]
    assert run.report["inference"]["stop"] == []


def test_one_line_that_is_no_object_keeps_a_text_a_text(tmp_path):
    run = execute(tmp_path, {"notes.txt": '{"prompt": "a", "completion": "b"}\nplain\n'})
    assert [row["prompt"] for row in run.records] == ["", ""]


def test_rows_are_named_by_their_physical_lines(tmp_path):
    table = 'prompt,completion\n"What is\nit?",a stone\nWhat was it?,\nWhat will it be?,sand\n'
    run = execute(tmp_path, {"d.csv": table})
    assert run.finding("empty_completion")["rows"] == [4]  # the header is 1, the first row takes 2 and 3


def test_stray_quotes_of_tsv_stay(tmp_path):
    run = execute(tmp_path, {"d.tsv": 'prompt\tcompletion\n7" disk\tround\n"open\tshut\nx\ty\n'})
    assert run.finding("format")["stray_quotes"] is True
    assert [row["prompt"] for row in run.records] == ['7" disk ->', '"open ->', "x ->"]


def test_values_of_json_become_json_text(tmp_path):
    given = [4, 0.5, True, ["a", 1], {"b": None}, "text"]
    run = execute(tmp_path, {"d.jsonl": pairs(*((f"q{k}", value) for k, value in enumerate(given)))})
    said = [row["completion"] for row in run.records]
    assert said == [" 4\n", " 0.5\n", " true\n", ' ["a", 1]\n', ' {"b": null}\n', " text\n"]
    finding = run.finding("nonstring_value")
    assert (finding["rows"], finding["level"]) == ([1, 2, 3, 4, 5], "warn")


def test_truth_values_of_a_workbook_read_as_it_shows_them(tmp_path):
    rows = [["prompt", "completion"], ["a b", True], ["c d", 12], ["e f", "g"]]
    run = execute(tmp_path, {"d.xlsx": workbook({"S": rows})})
    assert [row["completion"] for row in run.records] == [" True\n", " 12\n", " g\n"]


def test_cells_that_look_like_nothing_are_text(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,completion\na x,NA\nb y,null\nc z,007\nd w,nan\n"})
    assert [row["completion"] for row in run.records] == [" NA\n", " null\n", " 007\n", " nan\n"]


def test_empty_completions_go_with_their_reasons(tmp_path):
    rows = [
        {"prompt": "a", "completion": "first"},
        {"prompt": "b", "completion": None},
        {"prompt": "c"},
        {"prompt": "d", "completion": ""},
        {"prompt": "e", "completion": " \t"},
        {"prompt": "f", "completion": "second"},
    ]
    run = execute(tmp_path, {"d.jsonl": lines(rows)})
    finding = run.finding("empty_completion")
    assert (finding["rows"], finding["count"]) == ([2, 3, 4, 5], 4)
    assert finding["reasons"] == {"null": 1, "missing key": 1, "empty": 1, "blank": 1}
    assert run.report["rows"] == {"read": 6, "rejected": 0, "dropped": {"empty_completion": 4}, "kept": 2}


def test_a_short_row_of_a_table_says_so(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,completion\nalone\na,b c\nd,e f\n"})
    assert run.finding("empty_completion")["reasons"] == {"short row": 1}


def test_lone_surrogates_are_replaced(tmp_path):
    run = execute(tmp_path, {"d.jsonl": '{"prompt": "a\\ud800", "completion": "b"}\n' + pairs(("c", "d"))})
    assert run.finding("lone_surrogate")["rows"] == [1]
    assert run.records[0]["prompt"] == "a\ufffd ->"


def test_a_column_name_that_utf8_does_not_have_is_reported_all_the_same(tmp_path):
    text = "".join(json.dumps({**row, "odd\ud800": 1}) + "\n" for row in ROWS)
    run = execute(tmp_path, {"d.jsonl": text})
    written = json.loads(run.files["d_prepared.report.json"])
    assert written["actions"][0]["params"] == {"columns": ["odd\ufffd"]}


# --- columns -------------------------------------------------------------------------------------


def test_names_that_differ_by_case_or_blanks_are_renamed(tmp_path):
    run = execute(tmp_path, {"d.csv": "Prompt, COMPLETION \na,b x\nc,d y\n"})
    assert run.applied == ["format", "column_name", "column_name", *EDITS]
    found = [each["data"] for each in run.report["findings"] if each["check"] == "column_name"]
    assert [(each["column"], each["found"]) for each in found] == [
        ("prompt", "Prompt"),
        ("completion", " COMPLETION "),
    ]
    assert [row["prompt"] for row in run.records] == ["a ->", "c ->"]


def test_the_exact_name_wins_and_the_loser_is_reported(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,Prompt,completion\na,lost,b x\nc,gone,d y\n"})
    assert [row["prompt"] for row in run.records] == ["a ->", "c ->"]
    finding = run.finding("column_name")
    assert (finding["loser"], finding["level"]) == ("Prompt", "warn")
    assert run.finding("extra_columns")["columns"] == ["Prompt"]
    assert "column_name" not in run.applied


def test_further_columns_are_left_out_and_listed(tmp_path):
    run = execute(tmp_path, {"d.csv": ",prompt,completion,who\n0,a,b x,me\n1,c,d y,you\n"})
    finding = run.finding("extra_columns")
    assert (finding["columns"], finding["unnamed"]) == (["Unnamed: 0", "who"], ["Unnamed: 0"])
    assert set(run.records[0]) == {"prompt", "completion"}


def test_an_absent_column_is_an_error_that_names_what_is_there(tmp_path):
    run = execute(tmp_path, {"d.csv": "question,label\na,b\n"})
    assert (run.exit, run.error["code"]) == (1, "missing_column")
    for said in ("['question', 'label']", "--map prompt=question", "--map completion=label"):
        assert said in run.error["message"]
    assert run.files == {}


def test_mapped_columns_are_read(tmp_path):
    flags = ("--map", "prompt=question", "--map", "completion=label")
    run = execute(tmp_path, {"d.csv": "question,label,completion\na,b x,old\nc,d y,old\n"}, *flags)
    assert [row["completion"] for row in run.records] == [" b x\n", " d y\n"]
    assert run.finding("extra_columns")["columns"] == ["extra_completion"]


def test_a_mapped_column_is_written_under_its_new_name_though_nothing_else_is_amiss(tmp_path):
    rows = [{"prompt": row["prompt"], "answer": row["completion"]} for row in FINISHED]
    run = execute(tmp_path, {"d.jsonl": lines(rows)}, "--map", "completion=answer")
    assert run.applied == ["column_name"]
    assert run.finding("column_name")["found"] == "answer"
    assert run.records == FINISHED


def test_absent_prompts_are_written_as_empty_ones(tmp_path):
    rows = [{"completion": " a thought"}, {"completion": " a doubt"}]
    run = execute(tmp_path, {"d.jsonl": lines(rows)}, "--task", "open-ended")
    assert run.applied == ["column_name"]
    assert run.records == [{"prompt": "", **row} for row in rows]


def test_mapping_a_column_that_is_not_there_is_an_error(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,answer\na,b\n"}, "--map", "completion=reply")
    assert (run.exit, run.error["code"], run.error["column"]) == (1, "missing_column", "reply")


def test_completions_alone_need_a_word(tmp_path):
    table = {"d.csv": "completion\na thought\na doubt\n"}
    run = execute(tmp_path, table)
    assert run.error["code"] == "missing_column"
    assert "open-ended" in run.error["message"]
    told = execute(tmp_path, table, "--task", "open-ended")
    assert told.records[0] == {"prompt": "", "completion": " a thought"}


def test_a_table_without_header_is_not_beheaded(tmp_path):
    table = {"d.csv": "How deep is the lake?,Forty metres\nHow wide?,A mile\n"}
    run = execute(tmp_path, table)
    assert (run.exit, run.error["code"]) == (1, "missing_column")
    assert "--no-header" in run.error["message"]
    assert "How deep is the lake?" in run.error["message"]
    assert len(execute(tmp_path, table, "--no-header").records) == 2


def test_one_name_with_two_contents_is_refused(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,completion,completion\na,b,c\n"})
    assert (run.exit, run.error["code"], run.error["column"]) == (1, "duplicate_column", "completion")


def test_equal_columns_of_one_name_count_once_and_are_named(tmp_path):
    run = execute(tmp_path, {"d.csv": "prompt,completion,completion\na,b x,b x\nc,d y,d y\n"})
    assert [row["completion"] for row in run.records] == [" b x\n", " d y\n"]
    assert run.finding("format")["merged"] == ["completion"]


def test_a_workbook_of_two_sheets_waits_for_a_choice(tmp_path):
    book = {"d.xlsx": workbook({"north": CELLS, "south": [CELLS[0], ["What is a fen?", "A wet meadow"]]})}
    run = execute(tmp_path, book)
    assert (run.exit, run.error["code"], run.files) == (1, "ambiguous_input", {})
    assert "north" in run.error["message"]
    assert "south" in run.error["message"]
    assert len(execute(tmp_path, book, "--sheet", "south", "--dry-run").report["findings"]) > 0
    assert execute(tmp_path, book, "--sheet", "all").records[-1]["prompt"] == "What is a fen? ->"


# --- what cannot be read -------------------------------------------------------------------------

BROKEN = pairs(("a", "b x"), ("c", "d y")) + '{"prompt": "cut\n' + pairs(("e", "f z"))


def test_a_broken_line_is_named(tmp_path):
    run = execute(tmp_path, {"d.jsonl": BROKEN})
    assert (run.exit, run.error["code"], run.error["row"], run.files) == (1, "bad_row", 3, {})
    assert run.error["column"] == len('{"prompt": "')


def test_all_bad_rows_are_named_at_once(tmp_path):
    run = execute(tmp_path, {"d.jsonl": pairs(("a", "b")) + "[1]\nnull\n{\n"})
    for row in (2, 3, 4):
        assert f"d.jsonl:{row}" in run.error["message"]


def test_bad_rows_can_be_set_aside_verbatim(tmp_path):
    run = execute(tmp_path, {"d.jsonl": BROKEN}, "--skip-bad")
    assert [row["prompt"] for row in run.records] == ["a ->", "c ->", "e ->"]
    assert run.report["rejected"] == {"count": 1, "rows": [3], "file": "d_rejected.jsonl"}
    (entry,) = map(json.loads, run.files["d_rejected.jsonl"].splitlines())
    assert (entry["row"], entry["code"], entry["content"]) == (3, "bad_row", '{"prompt": "cut')
    assert run.unaccounted() == 0


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("d.jsonl", b"", "empty_data"),
        ("d.csv", b"prompt,completion\n", "empty_data"),
        ("d.jsonl", b'{"prompt": "a", "completion": null}\n', "empty_data"),
        ("d.txt", b"\n \n", "empty_data"),
        ("d.doc", b"words", "unsupported_format"),
        ("d.xls", b"words", "unsupported_format"),
        ("d.xlsx", b"words", "file_corrupt"),
        ("d.jsonl.gz", b"words", "file_corrupt"),
        ("d.csv", b"prompt,completion\na,b\nc,caf\xe9\n", "bad_encoding"),
        ("d.csv", b"prompt,completion\na,b,c\n", "bad_row"),
        ("d.csv", b'prompt,completion\na,"b\n', "bad_row"),
    ],
)
def test_what_cannot_be_used_has_a_code_and_leaves_nothing(tmp_path, name, content, code):
    run = execute(tmp_path, {name: content})
    assert (run.exit, run.error["code"], run.files) == (1, code, {})


def test_a_wrong_byte_is_placed_and_the_encoding_can_be_named(tmp_path):
    table = b"prompt,completion\na,b x\nc,caf\xe9\n"
    run = execute(tmp_path, {"d.csv": table})
    assert (run.error["row"], run.error["byte"]) == (3, table.index(b"\xe9"))
    assert execute(tmp_path, {"d.csv": table}, "--encoding", "latin-1").records[1]["completion"] == " café\n"


@pytest.mark.parametrize("path", ["absent.csv", "."])
def test_a_missing_file_is_an_error(tmp_path, path):
    with pytest.raises(FileNotFoundError) as caught:
        prepare(tmp_path / path)
    assert caught.value.code == "input_not_found"


# --- rows that are no pairs ----------------------------------------------------------------------

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Riddle {k}?"},
            {"role": "assistant", "content": f"Answer {k}"},
        ]
    }
    for k in range(3)
]
PREFERENCES = [{"prompt": f"Riddle {k}?", "chosen": f"Good {k}", "rejected": f"Bad {k}"} for k in range(3)]


JUDGED = [{"prompt": f"Riddle {k}?", "completion": f"Answer {k}", "label": k > 0} for k in range(3)]


@pytest.mark.parametrize(
    ("rows", "task"), [(CHATS, "messages"), (PREFERENCES, "preference"), (JUDGED, "preference")]
)
def test_good_chats_and_preferences_are_left_as_they_are(tmp_path, rows, task):
    run = execute(tmp_path, {"d.jsonl": lines(rows)})
    assert (run.exit, run.report["task"], run.applied, run.files) == (0, task, [], {})


@pytest.mark.parametrize("rows", [CHATS, PREFERENCES])
def test_their_rows_are_converted_and_their_duplicates_dropped_unchanged(tmp_path, rows):
    run = execute(tmp_path, {"d.json": json.dumps([*rows, rows[0]])})
    assert run.applied == ["format", "duplicate"]
    assert run.records == rows


def test_a_bad_chat_is_a_bad_row(tmp_path):
    bad = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}
    run = execute(tmp_path, {"d.jsonl": lines([*CHATS, bad])})
    assert (run.exit, run.error["code"], run.error["row"]) == (1, "bad_row", 4)


def test_options_about_pairs_say_nothing_about_chats(tmp_path):
    run = execute(tmp_path, {"d.jsonl": lines(CHATS)}, "--ending", "eos")
    assert run.exit == 2
    assert "ending has no effect on messages" in run.error["message"]


@pytest.mark.parametrize("blank", [" \n", "\ufeff", "\n\n"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv", "d.tsv", "d.txt"])
def test_blanks_alone_are_no_data_in_any_format(tmp_path, name, blank):
    assert execute(tmp_path, {name: blank}).error["code"] == "empty_data"
