"""The library's source holds no door that runs what a file or a model says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = sorted((ROOT / "ftlib").rglob("*.py"))
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "eval",
    "exec",
}


def offences(source: str) -> list[str]:
    """What a source does that is banned, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                f"{node.lineno}: import {each}" for each in modules if each.split(".")[0] in BANNED_MODULES
            ]
            qualified = (
                [f"{node.module}.{name}" for name in names] if isinstance(node, ast.ImportFrom) else []
            )
            found += [f"{node.lineno}: import {each}" for each in qualified if each in BANNED_CALLS]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS:
                found.append(f"{node.lineno}: {name}()")
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "trust_remote_code") and on:
                    found.append(f"{node.lineno}: {keyword.arg}=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_pickle_no_evaluated_text_no_shell(path: Path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "torch.load(path)",
        "from torch import load, save",
        "torch.save(x, path)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scan_sees(source):
    assert offences(source)


@pytest.mark.parametrize("source", ["model.eval()", "safetensors.torch.save_file(x, p)", "run(shell=False)"])
def test_the_scan_lets_pass(source):
    assert offences(source) == []
