"""Whatever stands in a file, prepare ends in a report or in an error that says what is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlib.data import prepare
from ftlib.errors import FtlibError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["prompt", "completion", "Prompt", "messages", "chosen", "rejected", "text", ""])
LINES = st.lists(st.dictionaries(KEYS, JSON, max_size=3), max_size=5).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
)
TABLES = st.text(st.sampled_from('ab,;\t|"\n\r \ufeff'), max_size=40).map(
    lambda text: f"prompt,completion\n{text}".encode()
)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("d.jsonl", LINES),
        ("d.json", LINES),
        ("d.csv", TABLES),
        ("d.tsv", TABLES),
        ("d.txt", TABLES),
        ("d.jsonl", st.binary(max_size=60)),
        ("d.csv", st.binary(max_size=60)),
    ],
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip_bad=st.booleans())
def test_no_error_but_ours(tmp_path, name, contents, data, skip_bad):
    content = data.draw(contents)
    (tmp_path / name).write_bytes(content)
    try:
        report = prepare(tmp_path / name, skip_bad=skip_bad).report
    except FtlibError:
        report = None
    assert (tmp_path / name).read_bytes() == content
    if report is not None:
        rows = report["rows"]
        assert rows["read"] == rows["kept"] + rows["rejected"] + sum(rows["dropped"].values())
        json.loads(json.dumps(report, allow_nan=False))
