"""One live process per output folder."""

from __future__ import annotations

import json
import os
import signal
import socket

import pytest

from ftlib.engine import lock as lock_module
from ftlib.engine.lock import LOCK, RunLock
from ftlib.errors import CheckpointError
from tests.engine.forked import fork, in_child


class Holder:
    """A process that holds the folder until its pipe is closed."""

    def __init__(self, folder):
        held_out, held_in = os.pipe()
        end_out, self._end_in = os.pipe()

        def hold():
            os.close(self._end_in)
            with RunLock(folder):
                os.write(held_in, b"held")
                os.read(end_out, 1)

        self.pid = fork(hold, folder / "errors")
        os.close(end_out)
        os.close(held_in)
        assert os.read(held_out, 4) == b"held"
        os.close(held_out)

    def end(self):
        os.close(self._end_in)
        os.waitpid(self.pid, 0)


@pytest.fixture
def holder(tmp_path):
    return Holder(tmp_path)


def test_second_process_fails_and_names_the_owner(tmp_path, holder):
    with pytest.raises(CheckpointError, match=f"held by process {holder.pid} on host {socket.gethostname()}"):
        RunLock(tmp_path).__enter__()
    holder.end()


def test_lock_of_a_killed_process_is_reclaimed_even_before_its_parent_noticed(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, still in the process table
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    holder.end()


def test_lock_released_by_its_owner_is_free(tmp_path, holder):
    holder.end()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path):
        pass


def test_child_forked_inside_does_not_release_the_lock(tmp_path):
    with RunLock(tmp_path) as lock:
        assert in_child(lambda say: lock.__exit__(None, None, None)).status == 0
        assert (tmp_path / LOCK).exists()


def test_lock_goes_on_exit_and_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_same_process_cannot_hold_a_folder_twice(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
            RunLock(tmp_path).__enter__()
        assert (tmp_path / LOCK).exists()


def owner(**changes):
    return json.dumps(lock_module._this_process() | changes)


@pytest.mark.parametrize(
    "content",
    [
        owner(boot_id="another boot"),
        owner(started=1),  # the id was used again
        owner(pid=2**22 + 1),  # above Linux's largest id
        "",
        "{",
        "[]",
        "{}",
    ],
    ids=["before a restart", "id used again", "no such process", "empty", "torn", "a list", "no fields"],
)
def test_stale_or_torn_lock_is_reclaimed(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_lock_of_another_host_is_believed(tmp_path):
    (tmp_path / LOCK).write_text(owner(host="elsewhere", pid=1))
    with pytest.raises(CheckpointError, match="process 1 on host elsewhere"):
        RunLock(tmp_path).__enter__()


def test_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder to write to"):
        RunLock(tmp_path / "file").__enter__()


def test_leftovers_of_dead_runs_go_and_nothing_else(tmp_path):
    dead = [".staging-run-a-00000002", ".trash-checkpoint-00000001", ".trash-checkpoint-00000001-1-3"]
    others = [".staging", ".trash-mine", "checkpoint-00000001", ".git"]
    for name in dead + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    outside = tmp_path / "checkpoint-00000001"
    (tmp_path / ".staging-run-b-00000003").symlink_to(outside)
    with RunLock(tmp_path):
        left = {path.name for path in tmp_path.iterdir()} - {LOCK}
    assert left == {*others, ".staging-run-b-00000003"}
    assert (outside / "file").exists()


def test_lock_taken_over_by_hand_is_not_removed_by_the_former_owner(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / LOCK).write_text(owner(pid=1, started=0))
    assert (tmp_path / LOCK).exists()


def test_folder_that_vanished_is_no_error_on_exit_and_is_not_made_again(tmp_path):
    with RunLock(tmp_path / "out"):
        (tmp_path / "out" / LOCK).unlink()
        (tmp_path / "out").rmdir()
    assert list(tmp_path.iterdir()) == []
