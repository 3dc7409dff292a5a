import sys
import threading

import pytest
from tqdm import auto
from transformers.utils import logging

from ftlib.models.quiet import quiet, without_load_report


@pytest.fixture(autouse=True)
def bars_are_on(monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # the suite's environment switches them off


def draw():
    for _ in logging.tqdm(range(3), desc="theirs"):
        pass
    for _ in auto.tqdm(range(3), desc="direct"):
        pass


def test_bars_are_drawn_outside_the_scope_and_not_inside(capsys):
    draw()
    assert {"theirs", "direct"} <= set(capsys.readouterr().err.replace(":", " ").split())
    with quiet():
        draw()
    assert capsys.readouterr().err == ""
    draw()
    assert "theirs" in capsys.readouterr().err


def test_errors_and_warnings_of_the_scope_are_seen(capsys):
    with quiet():
        draw()
        print("look here", file=sys.stderr)
    assert capsys.readouterr().err == "look here\n"


def test_another_thread_draws_on(capsys):
    with quiet():
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    assert "theirs" in capsys.readouterr().err


def test_everything_is_put_back_after_an_exception():
    stream, verbosity = sys.stderr, logging.get_verbosity()
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert sys.stderr is stream
    assert logging.get_verbosity() == verbosity
    assert logging.set_tqdm_hook(None) is None


def test_one_thread_leaves_the_table_of_missing_weights_out_and_nothing_else(monkeypatch):
    logger, told = logging.get_logger("transformers.modeling_utils"), []
    monkeypatch.setattr(logger, "handle", lambda record: logger.filter(record) and told.append(record.msg))
    with without_load_report():
        logger.warning("Bert LOAD REPORT from: here")
        logger.warning("something else")
        other = threading.Thread(target=logger.warning, args=["Bert LOAD REPORT of another"])
        other.start()
        other.join()
    logger.warning("Bert LOAD REPORT afterwards")
    assert told == ["something else", "Bert LOAD REPORT of another", "Bert LOAD REPORT afterwards"]
