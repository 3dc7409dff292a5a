"""Files that appear whole, stay within a bound, and leave everybody else's alone."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ftlib.models import logprob_files
from ftlib.models.logprob_files import LogprobFiles, pack, unpack

KEY, OTHER_KEY = "a" * 64, "b" * 64
PLENTY = 2**20


def groups(*names: str, length: int = 3) -> dict[bytes, Tensor]:
    return {
        sha256(name.encode()).digest(): torch.full((length,), float(index))
        for index, name in enumerate(names)
    }


def same(found: dict[bytes, Tensor], expected: dict[bytes, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "kept", [groups("x", "y"), groups(), groups("x", length=0)], ids=["two", "none", "empty"]
)
def test_packing_keeps_order_and_bits(kept: dict[bytes, Tensor]) -> None:
    assert same(unpack(pack(kept)), kept)


@pytest.mark.parametrize(
    "change",
    [
        {"digests": None},
        {"digests": torch.zeros(2, 31, dtype=torch.uint8)},
        {"lengths": torch.tensor([3, 4])},
        {"lengths": torch.tensor([7, -1])},
        {"lengths": torch.tensor([3.0, 3.0])},
        {"values": torch.zeros(6, dtype=torch.float64)},
        {"values": torch.zeros(2, 3)},
    ],
)
def test_tensors_that_were_not_packed_are_no_groups(change: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack(pack(groups("x", "y")) | change)


def test_a_file_says_its_key_and_needs_nothing_but_safetensors(tmp_path: Path) -> None:
    path = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY).add(groups("x"))
    assert path is not None
    assert path.name.startswith(KEY)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["key"] == KEY
        assert file.get_tensor("values").tolist() == [0.0, 0.0, 0.0]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_failing_write_leaves_nothing_and_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(logprob_files, "save_file", full)
    files = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY)
    assert files.add(groups("x")) is None
    monkeypatch.undo()
    assert files.add(groups("x")) is None
    assert list(tmp_path.iterdir()) == []
    assert "No space left" in caplog.text


def test_what_a_killed_process_left_is_no_group_and_goes_in_time(tmp_path: Path) -> None:
    young, old, foreign = (tmp_path / f".{name * 32}.partial" for name in "abz")
    for path in (young, old, foreign):
        path.write_bytes(b"half")
        if path != young:
            os.utime(path, (0, 0))
    files = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY)
    assert files.load() == {}
    files.add(groups("x"))
    assert [path.exists() for path in (young, old, foreign)] == [True, False, True]


def test_the_folder_stays_within_its_bound_and_the_oldest_go_first(tmp_path: Path) -> None:
    size = LogprobFiles(tmp_path / "one", KEY, max_bytes=PLENTY).add(groups("x")).stat().st_size  # type: ignore[union-attr]
    files = LogprobFiles(tmp_path, KEY, max_bytes=3 * size)
    for age, name in enumerate("wxyz"):
        path = LogprobFiles(tmp_path, OTHER_KEY if name == "w" else KEY, max_bytes=PLENTY).add(groups(name))
        os.utime(path, (age, age))  # type: ignore[type-var]
    files.add(groups("new"))
    assert files.load().keys() == groups("y", "z", "new").keys()
    assert LogprobFiles(tmp_path, OTHER_KEY, max_bytes=PLENTY).load() == {}


def test_reading_makes_files_young(tmp_path: Path) -> None:
    files = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY)
    path = files.add(groups("x"))
    os.utime(path, (0, 0))  # type: ignore[type-var]
    files.load()
    assert path.stat().st_mtime > 0  # type: ignore[union-attr]


def test_files_of_others_are_neither_read_nor_removed(tmp_path: Path) -> None:
    others = [
        tmp_path / name
        for name in ("model.safetensors", f"{KEY}.safetensors", "notes.txt", ".hidden.partial")
    ]
    for path in others:
        path.write_text("theirs")
        os.utime(path, (0, 0))
    files = LogprobFiles(tmp_path, KEY, max_bytes=1)
    first, last = files.add(groups("x")), files.add(groups("y"))
    assert first is not None
    assert last is not None
    assert (first.exists(), last.exists()) == (False, True)
    assert files.load() == {}  # larger than the bound
    assert all(path.read_text() == "theirs" for path in others)


def test_many_files_become_one_with_the_same_groups(tmp_path: Path) -> None:
    names = [str(number) for number in range(logprob_files._MANY + 1)]
    files = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY)
    for name in names:
        files.add(groups(name))
    other = LogprobFiles(tmp_path, OTHER_KEY, max_bytes=PLENTY).add(groups("other"))
    before = files.load()
    assert before.keys() == groups(*names).keys()
    assert len(list(tmp_path.iterdir())) == 2
    assert other is not None
    assert other.exists()
    assert same(LogprobFiles(tmp_path, KEY, max_bytes=PLENTY).load(), before)


def test_a_header_of_nonsense_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = LogprobFiles(tmp_path, KEY, max_bytes=PLENTY)
    path = files.add(groups("x"))
    header = json.dumps({"values": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)  # type: ignore[union-attr]
    assert files.load() == {}
    assert "passed over" in caplog.text
