"""A gigabyte is prepared in bounded memory."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

GIGABYTE, MEGABYTE = 10**9, 10**6
# Numbers and hashes of a row, and buffers, on top of what the libraries take once they are loaded.
BYTES_PER_ROW, BUFFERS = 500, 150 * MEGABYTE
PROGRAM = """
import resource, sys
import torch, datasets
from ftlib.__main__ import main
import ftlib.data.preparation.command

status = open("/proc/self/status").read()
loaded = int(status.split("VmData:")[1].split()[0]) * 1024
limit = loaded + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # memory of its own; not what is mapped from disk
code = main(["prepare", sys.argv[1], "-q", "--out", sys.argv[2]])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""
SYLLABLES = ("ka", "lo", "mi", "nu", "pe", "ra", "so", "ti", "vu", "we")
WORDS = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]


def write_rows(path, size):
    """At least `size` bytes in rows of about a kilobyte, every thousandth a duplicate; gives their number."""
    draw = random.Random(0)
    count = written = 0
    line = ""
    with path.open("w") as file:
        while written < size:
            if count % 1000 != 999:
                words = draw.choices(WORDS, k=140)
                row = {"prompt": " ".join(words[:40]), "completion": " ".join(words[40:])}
                line = json.dumps(row) + "\n"
            written += file.write(line)
            count += 1
    return count


def measured(source, folder, allowed):
    """Peak resident memory of a run in bytes, pages of mapped files included, and its seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(folder), str(allowed)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("PEAK", 1)[1]), time.monotonic() - began


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.timeout(3 * 3600)
@pytest.mark.parametrize("size", [100 * MEGABYTE, GIGABYTE])
def test_memory_grows_by_a_few_numbers_per_row(tmp_path, size, record_property):
    source = tmp_path / "d.jsonl"
    rows = write_rows(source, size)
    peak, seconds = measured(source, tmp_path / "out", BUFFERS + BYTES_PER_ROW * rows)
    record_property("peak_megabytes", peak // MEGABYTE)
    record_property("megabytes_per_second", round(size / MEGABYTE / seconds, 2))
    print(f"{size // MEGABYTE} MB, {rows} rows: peak {peak // MEGABYTE} MB, {seconds:.0f} s")
    with (tmp_path / "out" / "d_prepared.jsonl").open() as written:
        assert sum(1 for _ in written) == rows - rows // 1000
