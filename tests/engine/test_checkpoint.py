"""The write and read protocol: a checkpoint exists whole and verified, or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ftlib.engine import checkpoint as checkpoint_module
from ftlib.engine import manifest as manifest_module
from ftlib.engine.checkpoint import CheckpointStore
from ftlib.engine.files import save_state, save_tensors
from ftlib.engine.lock import RunLock
from ftlib.engine.manifest import newest_valid, read_manifest, seal_files, verify, write_manifest
from ftlib.errors import CheckpointError, FtlibError
from tests.engine.forked import in_child

WEIGHT = torch.arange(6, dtype=torch.float32)
BYTES = 1000
STAGES = (1, 2, 3, 4, 5, 6)


def write(staging: Path) -> None:
    save_tensors(staging / "train_state.safetensors", {"weight": WEIGHT})
    save_state(staging / "state.json", {"cursor": 7})


def save(store: CheckpointStore, step: int, **options) -> Path:
    return store.save(step, write, manifest={"versions": {"torch": "x"}}, expected_bytes=BYTES, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def store_in(folder: Path, **options) -> CheckpointStore:
    return CheckpointStore(folder, run_id="run-a", **options)


# --- writing ---------------------------------------------------------------------------------------


def test_saved_folder_verifies_and_carries_its_step(tmp_path):
    path = save(store_in(tmp_path), 120)
    assert path == tmp_path / "checkpoint-00000120"
    manifest = verify(path)
    assert (manifest["step"], manifest["run_id"], manifest["format"]) == (120, "run-a", 1)
    assert manifest["versions"] == {"torch": "x"}
    assert set(manifest["files"]) == {"train_state.safetensors", "state.json"}
    assert names(tmp_path) == ["checkpoint-00000120"]


def record_calls(monkeypatch) -> list[str]:
    """Every flush and rename in order, by file name; the originals still run."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor):
        calls.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def recorded_rename(self, target):
        calls.append(f"rename {self.name} {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
def test_files_then_manifest_then_folder_are_flushed_before_the_rename_and_the_parent_after(
    tmp_path, monkeypatch
):
    store = store_in(tmp_path)
    calls = record_calls(monkeypatch)
    save(store, 3)
    staging = ".staging-run-a-00000003"
    assert calls == [
        f"fsync {staging}",  # learns whether folders can be flushed here
        "fsync state.json",
        "fsync train_state.safetensors",
        "fsync manifest.json",
        f"fsync {staging}",
        f"rename {staging} checkpoint-00000003",
        f"fsync {tmp_path.name}",
    ]


def test_older_checkpoints_go_only_after_the_new_one_was_read_again(tmp_path, monkeypatch):
    store = store_in(tmp_path, keep=1)
    save(store, 1)
    seen = []
    verify_then = checkpoint_module.verify
    monkeypatch.setattr(
        checkpoint_module, "verify", lambda *a, **k: (seen.append(names(tmp_path)), verify_then(*a, **k))[1]
    )
    save(store, 2)
    assert seen == [["checkpoint-00000001", "checkpoint-00000002"]]
    assert names(tmp_path) == ["checkpoint-00000002"]


def test_platform_without_folder_flush_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "fsync_folder", lambda path: False)
    assert verify(save(store_in(tmp_path), 1))["folder_fsync"] is False


def test_existing_name_is_never_replaced(tmp_path):
    store = store_in(tmp_path, keep=3)
    first = save(store, 5)
    (first / "state.json").write_text("{}")  # now broken, so this step is written again
    second = save(store, 5)
    assert second.name == "checkpoint-00000005-1"
    found = newest_valid(tmp_path)
    assert found.path == second


def test_links_and_folders_are_refused_while_writing(tmp_path):
    store = store_in(tmp_path)

    def write_link(staging):
        (staging / "model.safetensors").symlink_to("/etc/hostname")

    for bad in (write_link, lambda staging: (staging / "sub").mkdir()):
        with pytest.raises(CheckpointError, match="expected a regular file, got a"):
            store.save(1, bad, manifest={}, expected_bytes=BYTES)
    assert names(tmp_path) == []


def test_manifest_keys_of_the_store_cannot_be_overwritten(tmp_path):
    with pytest.raises(CheckpointError, match=r"\['step'\]"):
        store_in(tmp_path).save(1, write, manifest={"step": 9}, expected_bytes=BYTES)
    assert names(tmp_path) == []


@pytest.mark.parametrize("run_id", ["", "../x", "a b", "x" * 65, "-x"])
def test_run_id_that_is_no_plain_name_is_refused(tmp_path, run_id):
    with pytest.raises(CheckpointError, match="run_id"):
        CheckpointStore(tmp_path, run_id=run_id)


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="keep"):
        store_in(tmp_path, keep=0)


# --- rotation --------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return [int(name.removeprefix("checkpoint-")) for name in names(folder)]


def test_newest_best_and_resumed_from_stay(tmp_path):
    first = save(store_in(tmp_path), 1)
    store = store_in(tmp_path, keep=2, resumed_from=first)
    for step in range(2, 8):
        save(store, step, best=step in (2, 3))
    assert steps(tmp_path) == [1, 3, 6, 7]


def test_only_folders_of_this_run_are_removed(tmp_path):
    CheckpointStore(tmp_path, run_id="run-b").save(1, write, manifest={}, expected_bytes=BYTES)
    (tmp_path / "checkpoint-2").mkdir()  # some other library's
    (tmp_path / "checkpoint-2" / "pytorch_model.bin").write_bytes(b"x")
    store = store_in(tmp_path, keep=1)
    for step in (3, 4):
        save(store, step)
    assert names(tmp_path) == ["checkpoint-00000001", "checkpoint-00000004", "checkpoint-2"]


def test_the_checkpoint_just_written_stays_even_when_older_branches_are_further(tmp_path):
    store = store_in(tmp_path, keep=1)
    save(store, 30)
    path = save(store, 20)
    assert path.exists()
    assert steps(tmp_path) == [20, 30]


# --- F2: killed at each stage ----------------------------------------------------------------------


def kill_while_saving(folder: Path, stage: int, save=save) -> None:
    """A process keeps step 1, and is killed in this stage of saving step 2."""

    def child(say):
        armed = []

        def on_stage(number):
            if armed and number == stage:
                os.kill(os.getpid(), signal.SIGKILL)

        with RunLock(folder):
            store = store_in(folder, keep=1, stage=on_stage)
            save(store, 1)
            armed.append(True)
            save(store, 2)

    ended = in_child(child)
    assert ended.status == -signal.SIGKILL, ended.said


def check_after_kill(folder: Path, stage: int) -> None:
    found = newest_valid(folder)
    assert found.manifest is not None
    assert found.manifest["step"] == (2 if stage == 6 else 1)
    assert found.skipped == []  # nothing partial under a final name


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_each_stage_leaves_a_checkpoint_that_verifies(tmp_path, stage):
    kill_while_saving(tmp_path, stage)
    check_after_kill(tmp_path, stage)
    left = any(name.startswith(".staging-") for name in names(tmp_path))
    assert left == (3 <= stage <= 5)
    with RunLock(tmp_path):  # the dead owner's lock is reclaimed, its leftovers go
        assert not [name for name in names(tmp_path) if name.startswith((".staging", ".trash"))]


def test_killed_while_removing_leaves_nothing_partial_under_a_final_name(tmp_path, monkeypatch):
    store = store_in(tmp_path, keep=1)
    save(store, 1)

    class Killed(BaseException):
        pass

    def half_removed(path):
        (Path(path) / "state.json").unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "_remove", half_removed)
        with pytest.raises(Killed):
            save(store, 2)
    assert names(tmp_path) == [".trash-checkpoint-00000001", "checkpoint-00000002"]
    with RunLock(tmp_path):
        assert names(tmp_path) == ["checkpoint-00000002", "run.lock"]


@pytest.mark.parametrize("stage", STAGES)
def test_error_at_each_stage_leaves_only_the_last_good_one_and_the_save_can_be_tried_again(tmp_path, stage):
    def fail(number):
        if armed and number == stage:
            raise ZeroDivisionError

    armed = False
    store = store_in(tmp_path, keep=1, stage=fail)
    save(store, 1)
    armed = True
    with pytest.raises(ZeroDivisionError):
        save(store, 2)
    assert names(tmp_path) == ["checkpoint-00000001"]
    armed = False
    save(store, 2)
    assert steps(tmp_path) == [2]


# --- F5, F6: disk full, folder gone, flush failing -------------------------------------------------


def test_full_disk_says_bytes_and_keeps_the_last_good_one_and_a_retry_works(tmp_path):
    """A file-size limit stands for the full disk: both make a write fail half way."""
    writers = [
        lambda staging: save_tensors(staging / "big.safetensors", {"w": torch.zeros(100_000)}),
        lambda staging: save_state(staging / "state.json", {"text": "x" * 100_000}),
    ]

    def child(say):
        store = store_in(tmp_path, keep=1)
        save(store, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for write_much in writers:
            with pytest.raises(CheckpointError) as caught:
                store.save(2, write_much, manifest={}, expected_bytes=400_000)
            say(caught.value)
            assert names(tmp_path) == ["checkpoint-00000001"]
            verify(tmp_path / "checkpoint-00000001")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.save(2, writers[0], manifest={}, expected_bytes=400_000)

    ended = in_child(child)
    assert ended.status == 0, ended.said
    assert len(ended.said) == len(writers)
    for message in ended.said:
        assert "File too large" in message
        assert "Needed: about 400,000 bytes; free: " in message
        assert "Free some space" in message
    assert newest_valid(tmp_path).manifest["step"] == 2


def test_too_little_free_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """1,000 bytes expected need 1,100 free."""
    store = store_in(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1099))
    with pytest.raises(CheckpointError, match="expected 1,100 bytes free for a checkpoint, got 1,099 bytes"):
        save(store, 1)
    assert names(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1100))
    save(store, 1)


def test_vanished_folder_is_an_error_with_its_name(tmp_path):
    folder = tmp_path / "out"
    store = store_in(folder)
    folder.rmdir()
    with pytest.raises(CheckpointError, match=f"{folder}.*No such file"):
        save(store, 1)


def test_file_in_the_place_of_the_folder_is_an_error_before_the_first_step(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder to write to"):
        store_in(tmp_path / "out")


def test_read_only_folder_is_an_error_at_save_and_keeps_old_files(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    save(store, 1)
    mkdir = Path.mkdir

    def refused(self, *args, **kwargs):  # chmod would not stop root
        if self.parent == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(
        CheckpointError, match=r"Read-only file system.*Check that the folder exists and is writ"
    ):
        save(store, 2)
    assert newest_valid(tmp_path).manifest["step"] == 1


@pytest.mark.parametrize("failing", range(6))
def test_flush_that_fails_anywhere_leaves_only_the_old_one(tmp_path, monkeypatch, failing):
    """A save flushes six times: staging, two files, manifest, staging, parent."""
    store = store_in(tmp_path, keep=1)
    save(store, 1)
    fsync, count = os.fsync, iter(range(6))

    def sometimes(descriptor):
        if next(count) == failing:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(store, 2)
    assert names(tmp_path) == ["checkpoint-00000001"]
    verify(tmp_path / "checkpoint-00000001")


def test_checkpoint_that_reads_back_wrong_is_taken_away(tmp_path, monkeypatch):
    store = store_in(tmp_path, keep=1)
    save(store, 1)
    publish = CheckpointStore._publish

    def truncating(self, staging, step):
        path = publish(self, staging, step)
        (path / "state.json").write_text("")
        return path

    monkeypatch.setattr(CheckpointStore, "_publish", truncating)
    with pytest.raises(CheckpointError, match=r"state\.json: expected .* bytes, got 0"):
        save(store, 2)
    assert names(tmp_path) == ["checkpoint-00000001"]


# --- F7: damaged folders ---------------------------------------------------------------------------


def flip_bit(folder: Path) -> str:
    file = folder / "train_state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return file.name


def truncate(folder: Path) -> str:
    file = folder / "train_state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return file.name


def empty(folder: Path) -> str:
    (folder / "state.json").write_bytes(b"")
    return "state.json"


def remove(folder: Path) -> str:
    (folder / "state.json").unlink()
    return "state.json"


def add(folder: Path) -> str:
    (folder / "extra.bin").write_bytes(b"x")
    return "extra.bin"


def link(folder: Path) -> str:
    (folder / "state.json").rename(folder.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent / "elsewhere.json")
    return "state.json"


def drop_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "manifest.json"


def cut_manifest(folder: Path) -> str:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-20])
    return "manifest.json"


def next_format(folder: Path) -> str:
    edit_manifest(folder, format=2)
    return "manifest.json"


def edit_manifest(folder: Path, **changes) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = [flip_bit, truncate, empty, remove, add, link, drop_manifest, cut_manifest, next_format]


def damaged_newest(folder: Path, damage) -> tuple[Path, Path, str]:
    """An older checkpoint, a newer damaged one, and the name of the file that is wrong."""
    store = store_in(folder)
    older, newer = save(store, 1), save(store, 2)
    return older, newer, damage(newer)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_named_and_the_older_one_used(tmp_path, damage):
    older, newer, name = damaged_newest(tmp_path, damage)
    found = newest_valid(tmp_path)
    assert found.path == older
    [(skipped, reason)] = found.skipped
    assert skipped == newer
    assert str(newer / name) in reason


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_explicit_path_raises_and_names_the_file(tmp_path, damage):
    path = save(store_in(tmp_path), 1)
    name = damage(path)
    with pytest.raises(CheckpointError) as caught:
        verify(path)
    assert str(path / name) in str(caught.value)
    assert isinstance(caught.value, FtlibError)


def test_order_is_by_the_step_in_the_manifest(tmp_path):
    store = store_in(tmp_path)
    low, high = save(store, 1), save(store, 2)
    low.rename(tmp_path / "checkpoint-99999999")
    assert newest_valid(tmp_path).path == high


def runs_in(folder: Path, **written: float) -> dict[str, Path]:
    """Runs of one checkpoint each, the first at the highest step; `written` is when."""
    made = {}
    for step, (run, time) in enumerate(reversed(written.items()), start=1):
        made[run] = CheckpointStore(folder, run_id=run).save(
            step, write, manifest={"name": run}, expected_bytes=BYTES
        )
        edit_manifest(made[run], written=time)
    return made


def test_the_run_written_to_last_comes_before_one_with_higher_steps(tmp_path):
    runs = runs_in(tmp_path, old=1.5, new=3.5, middle=2.5)
    assert newest_valid(tmp_path).path == runs["new"]
    assert newest_valid(tmp_path).runs == ("new", "middle", "old")


def test_a_preferred_run_comes_first_and_the_others_after_it(tmp_path):
    runs = runs_in(tmp_path, old=1.5, new=3.5, middle=2.5)
    preferred = {"prefer": lambda manifest: manifest["name"] in ("old", "middle")}
    order = []
    while (path := newest_valid(tmp_path, **preferred).path) is not None:
        order.append(path)
        drop_manifest(path)
    assert order == [runs["middle"], runs["old"], runs["new"]]


def test_a_checkpoint_says_when_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module.time, "time", lambda: 1234.5)
    assert verify(save(store_in(tmp_path), 1))["written"] == 1234.5


def test_checkpoints_without_a_time_go_by_their_step(tmp_path):
    runs = runs_in(tmp_path, high=0.0, low=0.0)
    for path in runs.values():
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["written"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert newest_valid(tmp_path).path == runs["high"]


def test_no_folder_and_empty_folder_hold_no_checkpoint(tmp_path):
    assert newest_valid(tmp_path) == newest_valid(tmp_path / "absent") == (None, None, [], ())


def test_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent: expected a checkpoint folder, got nothing"):
        verify(tmp_path / "absent")


def test_linked_checkpoint_folder_is_skipped(tmp_path):
    elsewhere = save(store_in(tmp_path / "other"), 9)
    (tmp_path / "checkpoint-00000009").symlink_to(elsewhere)
    found = newest_valid(tmp_path)
    assert found.path is None
    assert "got a link" in found.skipped[0][1]


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "C:evil", "nul\0byte", "manifest.json"],
)
def test_manifest_with_a_name_outside_the_folder_is_refused(tmp_path, name):
    path = save(store_in(tmp_path), 1)
    edit_manifest(path, files=read_manifest(path)["files"] | {name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match="expected plain file names"):
        verify(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "1"},
        {"step": -1},
        {"step": True},
        {"run_id": 3},
        {"files": []},
        {"files": {"state.json": 3}},
        {"files": {"state.json": {"bytes": "3", "sha256": "x"}}},
        {"files": {"state.json": {"bytes": 3}}},
    ],
)
def test_manifest_that_makes_no_sense_is_refused_as_a_checkpoint_error(tmp_path, changes):
    path = save(store_in(tmp_path), 1)
    edit_manifest(path, **changes)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b""])
def test_manifest_that_is_no_object_is_refused_as_a_checkpoint_error(tmp_path, content):
    path = save(store_in(tmp_path), 1)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)


# --- F20: with a mechanism switched off, the checks above fail --------------------------------------


def save_in_place(store: CheckpointStore, step: int) -> None:
    """The protocol without its staging folder and rename."""
    path = store.folder / f"checkpoint-{step:08d}"
    path.mkdir()
    store._stage(3)
    write(path)
    store._stage(4)
    own = {"run_id": store.run_id, "step": step, "best": False, "folder_fsync": True}
    write_manifest(path, own | {"files": seal_files(path)}, {})


@pytest.mark.parametrize("stage", [3, 4])
def test_writing_in_place_would_be_caught(tmp_path, stage):
    kill_while_saving(tmp_path, stage, save_in_place)
    with pytest.raises(AssertionError):
        check_after_kill(tmp_path, stage)


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, remove, add, link])
def test_trusting_the_folder_without_its_manifest_would_be_caught(tmp_path, damage, monkeypatch):
    _, newer, _ = damaged_newest(tmp_path, damage)
    monkeypatch.setattr(manifest_module, "verify", lambda path: {})
    assert newest_valid(tmp_path).path == newer


def test_checking_sizes_without_hashes_would_be_caught(tmp_path, monkeypatch):
    _, newer, _ = damaged_newest(tmp_path, flip_bit)
    monkeypatch.setattr(manifest_module, "verify", lambda path: verify(path, hashes=False))
    assert newest_valid(tmp_path).path == newer
