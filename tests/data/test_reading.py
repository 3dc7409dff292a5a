"""Files of every kind to located rows, and what each kind of damage is called."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import zipfile

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.reading import Place, place_of, read_table
from ftlib.errors import ConfigError, DataError

ROWS = [
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"prompt": 'Say "hi", then\nwait', "completion": "NA"},
    {"prompt": "Ünï 😀 \u2028 x", "completion": "007"},
]


def csv_text(rows, delimiter=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(rows[0])]
    return "\n".join([*lines, *(delimiter.join(cell(row[k]) for k in rows[0]) for row in rows)]) + "\n"


def workbook(path, sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)


def as_xlsx(path, rows):
    workbook(path, {"Sheet": [list(rows[0]), *(list(row.values()) for row in rows)]})


def text_writer(render):
    return lambda path, rows: path.write_bytes(render(rows).encode())


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


WRITERS = {  # name -> (writer, format, shape)
    "a.csv": (text_writer(csv_text), "csv", "table"),
    "semicolon.csv": (text_writer(lambda rows: csv_text(rows, ";")), "csv", "table"),
    "bar.csv": (text_writer(lambda rows: csv_text(rows, "|")), "csv", "table"),
    "B.JSONL": (text_writer(jsonl), "jsonl", "lines"),
    "crlf.jsonl": (text_writer(lambda rows: jsonl(rows).replace("\n", "\r\n")), "jsonl", "lines"),
    "lines.json": (text_writer(jsonl), "jsonl", "lines"),
    "lines.txt": (text_writer(jsonl), "jsonl", "lines"),
    "lines.csv": (text_writer(jsonl), "jsonl", "lines"),
    "array.json": (text_writer(lambda rows: json.dumps(rows, indent=1)), "json", "array"),
    "array.jsonl": (text_writer(json.dumps), "json", "array"),
    "array.csv": (text_writer(lambda rows: json.dumps(rows, indent=1)), "json", "array"),
    "columns.json": (
        text_writer(lambda rows: json.dumps({k: [row[k] for row in rows] for k in rows[0]})),
        "json",
        "columns",
    ),
    **{
        f"{key}.json": (
            text_writer(lambda rows, key=key: json.dumps({"version": 1, key: rows})),
            "json",
            f"list under {key!r}",
        )
        for key in ("data", "examples", "records", "rows", "items")
    },
    "a.xlsx": (as_xlsx, "xlsx", "table"),
    "book.csv": (as_xlsx, "xlsx", "table"),
    "a.parquet": (lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path), "parquet", "table"),
    "bom.csv": (text_writer(lambda rows: "\ufeff" + csv_text(rows)), "csv", "table"),
    "bom.jsonl": (text_writer(lambda rows: "\ufeff" + jsonl(rows)), "jsonl", "lines"),
    **{
        f"{encoding}.{extension}": (
            lambda path, rows, render=render, encoding=encoding: path.write_bytes(
                ("\ufeff" + render(rows)).encode(encoding)
            ),
            extension,
            shape,
        )
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le")
        for extension, render, shape in (("csv", csv_text, "table"), ("jsonl", jsonl, "lines"))
    },
}
PACKERS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}


def rows_of(path, **options):
    return [located.value for located in read_table(path, **options)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_gives_the_same_rows(name, tmp_path):
    writer, form, shape = WRITERS[name]
    writer(tmp_path / name, ROWS)
    table = read_table(tmp_path / name)
    assert [located.value for located in table] == ROWS
    assert (table.facts.format, table.facts.shape) == (form, shape)
    assert [located.value for located in table] == ROWS  # a second pass


@pytest.mark.parametrize("key", ["data", "rows"])
def test_an_element_under_a_usual_key_that_is_no_object_is_a_bad_row(tmp_path, key):
    (tmp_path / "a.json").write_text(json.dumps({key: [{"text": "a"}, 3, {"text": "b"}]}))
    first, second, third = read_table(tmp_path / "a.json")
    assert (first.value, third.value) == ({"text": "a"}, {"text": "b"})
    assert isinstance(second.value, DataError)
    assert (second.value.code, second.value.row) == ("bad_row", 2)


def test_columns_of_text_that_differ_in_length_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": ["a", "b"], "completion": ["c"]}')
    with pytest.raises(
        DataError, match=r"expected columns of one length, got \{'prompt': 2, 'completion': 1\}"
    ):
        read_table(tmp_path / "a.json")


def test_one_object_may_hold_lists_of_numbers_of_any_length(tmp_path):
    row = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert [located.value for located in read_table(tmp_path / "a.json")] == [row]


def test_line_ends_of_carriage_returns_alone_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\ra,b\rc,d\r")
    with pytest.raises(DataError, match="got lines that end in a carriage return alone"):
        list(read_table(tmp_path / "a.csv"))


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("name", ["a.csv", "B.JSONL", "array.json", "a.xlsx", "a.parquet"])
def test_compressed_files_are_read_as_if_they_were_not(name, packed, tmp_path):
    WRITERS[name][0](tmp_path / name, ROWS)
    for target in (tmp_path / f"{name}.{packed}", tmp_path / f"silent{(tmp_path / name).suffix}"):
        target.write_bytes(PACKERS[packed]((tmp_path / name).read_bytes()))
        assert rows_of(target) == ROWS
        assert read_table(target).facts.compression == packed


def test_several_members_and_padding_are_one_file(tmp_path):
    parts = [gzip.compress(part.encode()) for part in (jsonl(ROWS[:1]), jsonl(ROWS[1:]))]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(parts) + b"\0" * 8)
    assert rows_of(tmp_path / "a.jsonl.gz") == ROWS


def test_places_are_physical_lines_sheet_rows_or_elements(tmp_path):
    (tmp_path / "a.csv").write_text('\ntext\n"two\nlines"\n\nz\n')
    assert [located.place.row for located in read_table(tmp_path / "a.csv")] == [3, 6]
    (tmp_path / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}\n')
    assert [located.place.row for located in read_table(tmp_path / "a.jsonl")] == [2, 4]
    workbook(tmp_path / "a.xlsx", {"First": [[None], ["text"], ["x"], [None], ["y"]]})
    places = [located.place for located in read_table(tmp_path / "a.xlsx")]
    assert [str(place) for place in places] == [f"{tmp_path}/a.xlsx:First!{row}" for row in (3, 5)]
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert [located.place.row for located in read_table(tmp_path / "a.json")] == [1, 2, 3]


@pytest.mark.parametrize(
    "place", [Place("a.csv", 3), Place("a:b.xlsx", 14, "First"), Place("C:\\x!y", 2), Place("a", 1, "x!y")]
)
def test_places_are_read_back_from_their_text(place):
    assert place_of(str(place)) == place


def test_text_that_names_no_place_is_told_apart():
    assert place_of("somewhere") is None


# --- CSV and TSV ---


def test_a_guessed_delimiter_names_usual_columns_and_is_told(tmp_path):
    for delimiter in ",;|":
        (tmp_path / "a.csv").write_text(f"prompt{delimiter}completion\na{delimiter}b\n")
        table = read_table(tmp_path / "a.csv")
        assert table.facts.delimiter == delimiter
        assert [located.value for located in table] == [{"prompt": "a", "completion": "b"}]
    (tmp_path / "a.csv").write_text("x;y\n1,2;3\n")
    assert read_table(tmp_path / "a.csv").facts.delimiter == ","
    assert rows_of(tmp_path / "a.csv", delimiter=";") == [{"x": "1,2", "y": "3"}]


def test_quotes_of_a_tsv_are_literal_unless_they_enclose_a_cell(tmp_path):
    lines = ['A 5" pipe\tsteel', '"open\tcopper', '"a\tb"\t"say ""x"""', 'end"\t', "short"]
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n" + "\n".join(lines))
    table = read_table(tmp_path / "a.tsv")
    assert [tuple(located.value.values()) for located in table] == [
        ('A 5" pipe', "steel"),
        ('"open', "copper"),
        ("a\tb", 'say "x"'),
        ('end"', ""),
        ("short", None),
    ]
    assert table.notes == {"stray_quotes": 3, "short_rows": 1}


def test_names_of_columns_stay_as_they_are_typed(tmp_path):
    (tmp_path / "a.csv").write_text(" Prompt ,,x\na,b,c\n")
    table = read_table(tmp_path / "a.csv")
    assert [located.value for located in table] == [{" Prompt ": "a", "Unnamed: 1": "b", "x": "c"}]
    assert table.facts.header == (" Prompt ", "", "x")


def test_tables_without_a_header_get_names(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\nc,d\n")
    expected = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert rows_of(tmp_path / "a.csv", header=False) == expected
    (tmp_path / "b.csv").write_text("a,b,c\n")
    assert rows_of(tmp_path / "b.csv", header=False) == [{"column_1": "a", "column_2": "b", "column_3": "c"}]
    workbook(tmp_path / "a.xlsx", {"S": [["a", "b"], ["c", "d"]]})
    assert rows_of(tmp_path / "a.xlsx", header=False) == expected


def test_equal_copies_of_a_column_are_one(tmp_path):
    (tmp_path / "a.csv").write_text("text,text\na,a\n")
    assert rows_of(tmp_path / "a.csv") == [{"text": "a"}]
    (tmp_path / "a.json").write_text('{"text": "a", "text": "a"}')
    assert rows_of(tmp_path / "a.json") == [{"text": "a"}]


# --- workbooks and plain text ---


def test_cells_of_a_workbook_keep_their_types(tmp_path):
    day = dt.date(2024, 2, 29)
    workbook(tmp_path / "a.xlsx", {"S": [["a", "b", "c", "d", "e"], [1, 2.5, True, "007", day]]})
    (row,) = rows_of(tmp_path / "a.xlsx")
    assert {k: v for k, v in row.items() if k != "e"} == {"a": 1, "b": 2.5, "c": True, "d": "007"}
    assert row["e"].startswith("2024-02-29")


def test_one_of_several_sheets_has_to_be_named(tmp_path):
    path = tmp_path / "a.xlsx"
    sheets = {"first": [["text"], ["a"], ["b"]], "empty": [], "header": [["text"]], "last": [["text"], ["c"]]}
    workbook(path, sheets)
    with pytest.raises(DataError, match=r"'first' \(2 rows\), 'last' \(1 rows\)") as caught:
        read_table(path)
    assert caught.value.code == "ambiguous_input"
    assert rows_of(path, sheet="last") == [{"text": "c"}]
    both = read_table(path, sheet="all")
    assert [str(located.place).rpartition(":")[2] for located in both] == ["first!2", "first!3", "last!2"]
    with pytest.raises(ConfigError, match="got 'other'"):
        read_table(path, sheet="other")


def test_every_line_of_a_text_is_a_row(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n {x}\n\u2028two\x0b \nlast\n".encode())
    table = read_table(tmp_path / "a.txt")
    assert [located.value["text"] for located in table] == ["one", "", " {x}", "\u2028two\x0b ", "last"]
    assert table.notes["blank_lines"] == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jsonl", {"delimiter": ";"}),
        ("a.jsonl", {"header": False}),
        ("a.csv", {"sheet": "S"}),
        ("a.parquet", {"encoding": "utf-8"}),
        ("a.csv", {"encoding": "no such"}),
        ("a.csv", {"delimiter": "::"}),
    ],
)
def test_options_that_say_nothing_about_a_file_are_refused(name, options, tmp_path):
    WRITERS.get(name, WRITERS["B.JSONL"])[0](tmp_path / name, ROWS)
    with pytest.raises(ConfigError):
        read_table(tmp_path / name, **options)


# --- damage ---

GOOD = jsonl(ROWS).encode()
WHOLE_FILES = {
    "none.jsonl": (None, "input_not_found"),
    "zero.csv": (b"", "empty_data"),
    "zero.jsonl.gz": (gzip.compress(b""), "empty_data"),
    "old.xls": (b"x", "unsupported_format"),
    "locked.xlsx": (b"\xd0\xcf\x11\xe0\xa1\xb1", "unsupported_format"),
    "what.pdf": (b"x", "unsupported_format"),
    "only.gz": (gzip.compress(GOOD), "unsupported_format"),
    "false.jsonl.gz": (GOOD, "file_corrupt"),
    "false.jsonl.zst": (gzip.compress(GOOD), "file_corrupt"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50)[:-20], "file_corrupt"),
    "cut.jsonl.zst": (zstandard.ZstdCompressor().compress(GOOD * 50)[:-5], "file_corrupt"),
    "bent.jsonl.gz": (gzip.compress(GOOD)[:20] + b"\xff" * 40, "file_corrupt"),
    "cut.parquet": (b"PAR1abc", "file_corrupt"),
    "text.parquet": (GOOD, "file_corrupt"),
    "text.xlsx": (GOOD, "file_corrupt"),
    "cut.xlsx": (b"PK\x03\x04abc", "file_corrupt"),
    "bare.json": (b"hello", "bad_row"),
    "cut.json": (b'[{"text": "a"}, {"te', "bad_row"),
    "latin.json": ('{"text": "caf\xe9"}'.encode("latin-1"), "bad_encoding"),
    "latin header.csv": ("t\xe9xt\na\n".encode("latin-1"), "bad_encoding"),
    "odd.csv": ("\ufeffa\nb\n".encode("utf-16-le") + b"\xd8", "bad_encoding"),
    "twice.csv": (b"text,x,text\na,b,c\n", "duplicate_column"),
    "quote.csv": (b'"text\na', "bad_row"),
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_damage_to_a_whole_file_has_a_code_and_names_it(name, tmp_path):
    content, code = WHOLE_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_table(tmp_path / name))
    assert caught.value.code == code
    assert str(caught.value).startswith(str(tmp_path / name))
    if code == "file_corrupt":
        assert 0 < caught.value.byte <= len(content)


def test_an_archive_that_is_no_workbook_is_corrupt(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("hello.txt", "x")
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "a.xlsx")
    assert caught.value.code == "file_corrupt"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["a.xlsx", "a.parquet"])
def test_cut_binary_files_are_corrupt_wherever_they_are_cut(name, share, tmp_path):
    WRITERS[name][0](tmp_path / name, ROWS * 20)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError) as caught:
        list(read_table(tmp_path / name))
    assert caught.value.code == "file_corrupt"


def test_a_table_of_a_cut_sheet_is_corrupt(tmp_path):
    as_xlsx(tmp_path / "a.xlsx", ROWS)
    with zipfile.ZipFile(tmp_path / "a.xlsx") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content[: len(content) // 2] if "sheet1" in name else content)
    with pytest.raises(DataError) as caught:
        list(read_table(tmp_path / "b.xlsx"))
    assert caught.value.code == "file_corrupt"


LINES = [
    b'{"text": "a"}',
    '{"text": "caf\xe9"}'.encode("latin-1"),
    b'{"text": "b"',
    b"[1, 2]",
    b'{"text": "c", "text": "d"}',
    b'{"text": ' + b"[" * 100_000,
    b'{"n": ' + b"9" * 5_000 + b"}",
    b'{"text": "e"}',
]


def test_bad_lines_are_given_with_their_place_code_and_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    bad = [located for located in read_table(tmp_path / "a.jsonl") if isinstance(located.value, DataError)]
    assert [(row.value.row, row.value.code) for row in bad] == [
        (2, "bad_encoding"),
        (3, "bad_row"),
        (4, "bad_row"),
        (5, "duplicate_column"),
        (6, "bad_row"),
        (7, "bad_row"),
    ]
    start = len(LINES[0]) + 1
    assert (bad[0].value.byte, bad[0].value.excerpt) == (start + LINES[1].index(b"\xe9"), "e9 22 7d 0a")
    assert bad[1].value.column == len(LINES[2]) + 1
    assert bad[1].value.byte == start + len(LINES[1]) + 1 + len(LINES[2])
    assert [row.raw for row in bad[1:3]] == [LINES[2].decode(), "[1, 2]"]


def test_bad_rows_of_a_csv_leave_the_others_readable(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\na,b\na,b,c\n"x"y,z\ncaf\xe9,b\nc,d\n"open,e\nf,g\n')
    rows = list(read_table(tmp_path / "a.csv"))
    codes = [row.value.code if isinstance(row.value, DataError) else "good" for row in rows]
    assert codes == ["good", "bad_row", "bad_row", "bad_encoding", "good", "bad_row"]
    assert [row.place.row for row in rows] == [2, 3, 4, 5, 6, 7]
    assert rows[1].raw == "a,b,c"
    assert rows[5].raw == '"open,e\nf,g'


def test_the_named_encoding_is_used(tmp_path):
    (tmp_path / "a.csv").write_bytes("text\ncafé\n".encode("cp1252"))
    assert rows_of(tmp_path / "a.csv", encoding="cp1252") == [{"text": "café"}]


def test_a_byte_order_mark_wins_over_the_named_encoding(tmp_path):
    (tmp_path / "a.csv").write_text("text\ncafé\n", encoding="utf-8-sig")
    assert rows_of(tmp_path / "a.csv", encoding="latin-1") == [{"text": "café"}]


# --- any text ---

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)


@given(rows=st.lists(st.fixed_dictionaries({"text": TEXT, "other": TEXT}), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_jsonl_json_and_parquet(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.jsonl").write_bytes(jsonl(rows).encode())
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "b.json").write_text(json.dumps({"text": [r["text"] for r in rows], "other": [""] * len(rows)}))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert rows_of(folder / name) == rows
    assert [row["text"] for row in rows_of(folder / "b.json")] == [row["text"] for row in rows]


@given(
    rows=st.lists(st.fixed_dictionaries({"prompt": CELLS, "completion": CELLS}), min_size=1, max_size=4),
    delimiter=st.sampled_from(",;|"),
)
@settings(max_examples=60, deadline=None)
def test_any_quoted_cell_survives_csv(rows, delimiter, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "a.csv"
    path.write_bytes(csv_text(rows, delimiter).encode())
    assert rows_of(path) == rows


@given(data=st.binary(max_size=60), name=st.sampled_from(["a.csv", "a.tsv", "a.txt", "a.json", "a.jsonl"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_rows_or_an_error_of_ours(data, name, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(data)
    rows, files = [], {str(path)}
    try:
        rows = list(read_table(path))
    except DataError as error:
        files.add(error.file)
    files |= {row.value.file for row in rows if isinstance(row.value, DataError)}
    assert files == {str(path)}
