from __future__ import annotations

import argparse
import json

import pytest

from ftlib.data import preview_command
from tests.data.tokenizers_zoo import tiny

ROWS = [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(5)]
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def run(*arguments):
    parser = argparse.ArgumentParser()
    preview_command.add_arguments(parser)
    return preview_command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_rows_are_shown_with_marks(file, capsys):
    assert run(file, "-n", 1) == 0
    out, err = capsys.readouterr()
    assert out == f"--- {file}:1: 6 tokens, 4 trained (67%), stop token trained\nq0[[ a0<|im_end|>]]\n"
    assert "bytes stand for tokens" in err


def test_three_rows_are_shown_unless_told(file, capsys):
    assert run(file) == 0
    assert capsys.readouterr().out.count("---") == 3


def test_a_tokenizer_is_read_from_its_folder(file, tmp_path, capsys):
    tiny("byte_level").save_pretrained(tmp_path / "tokenizer")
    assert run(file, "--tokenizer", tmp_path / "tokenizer", "--json", "-n", 2) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["spans"] for row in rows] == [
        [["q0", 0.0], [" a0</s>", 1.0]],
        [["q1", 0.0], [" a1</s>", 1.0]],
    ]
    assert not err


def test_chats_are_laid_out_without_a_model(tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(CHAT))
    assert run(path) == 0
    assert (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Ho<|im_end|>]]" in capsys.readouterr().out
    )


def test_bad_data_exit_with_1_and_wrong_usage_with_2(file, tmp_path, capsys):
    assert run(tmp_path / "absent.jsonl") == 1
    assert "absent.jsonl" in capsys.readouterr().err
    assert run(file, "-n", 0) == 2
    assert "expected -n of at least 1, got 0" in capsys.readouterr().err
    assert run(file, "--tokenizer", tmp_path / "nothing") == 2
    assert "expected --tokenizer as a folder" in capsys.readouterr().err
