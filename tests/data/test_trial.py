"""Chat templates that would loop or fill memory are refused before they run here."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from ftlib.data import Encoder, formatters, load_records, trial
from ftlib.errors import DataError
from tests.data.templates_zoo import FAMILIES
from tests.data.tokenizers_zoo import CHATML, tiny

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROUND = "{% for i in range(99999) %}"
LOOP = ROUND + ROUND + "{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _nothing_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_found", {})
    monkeypatch.setattr(trial, "SECONDS", 1)


def tried(template: str) -> str | None:
    return trial.try_template(template, MESSAGES, {"bos_token": "<s>"}, None)


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (LOOP, "runs for more than"),
        ("{{ 'A' * 300000000 }}", "MB of memory"),
        ("{{ 'A' * 2000000 }}", "characters beside"),
        (ROUND + "{{ 'A' * 99999 }}{% endfor %}", "characters beside"),
        (
            "{% set ns = namespace(x='A') %}" + ROUND + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "MB of memory|runs for more than",  # whichever a slow machine reaches first
        ),
        ("{% if messages | length > 2 %}" + LOOP + "{% endif %}", "runs for more than"),
        ("{% if messages | length < 4 %}{{ raise_exception('no') }}{% endif %}" + LOOP, "runs for more than"),
    ],
    ids=["loop", "constant", "long", "long_loop", "doubling", "later_turns", "behind_an_error"],
)
def test_a_template_that_takes_too_much_is_refused(template: str, wrong: str) -> None:
    assert re.search(wrong, str(tried(template)))


def test_the_encoder_names_the_row_and_renders_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def rendered(*_: Any, **__: Any) -> None:
        raise AssertionError("rendered in this process")

    encoder = Encoder(tiny(), formatter=formatters.chat(template=LOOP))
    records = load_records([{"messages": MESSAGES}])
    monkeypatch.setattr("ftlib.data.rendering.render_jinja_template", rendered)
    with pytest.raises(DataError, match=r"chat template: it runs for more than 2 s .* use another") as caught:
        encoder(records)
    assert (caught.value.code, caught.value.row) == ("template", 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_models_pass(name: str) -> None:
    assert tried(FAMILIES[name].template) is None


@pytest.mark.parametrize("template", ["{{ messages | nonsense }}", "{{ raise_exception('no') }}", "{% if %}"])
def test_errors_of_a_template_are_left_to_its_rendering(template: str) -> None:
    assert tried(template) is None


def test_a_long_conversation_is_no_fault_of_the_template() -> None:
    long = [{"role": "user", "content": "a" * 3_000_000}, MESSAGES[1]]
    assert trial.try_template(CHATML, long, {}, None) is None


def test_a_template_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(CHATML) is None
    monkeypatch.setattr(subprocess, "run", None)
    assert tried(CHATML) is None


def test_where_no_process_can_be_started_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("not here")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert tried(CHATML) is None
    assert "no process could be started: not here" in caplog.text


def test_where_the_program_is_no_python_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert tried(CHATML) is None
    assert "rendered without a trial in a process of its own: /bin/false ended with 1" in caplog.text


@pytest.mark.parametrize("code", [-11, 0xC0000005])
def test_a_template_that_ends_its_process_is_refused(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    died = subprocess.CompletedProcess([], code, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    assert f"ends the process that renders it (exit code {code})" in str(tried(CHATML))
