"""The checkpoints of one trainer: found, refused or resumed, saved, and the best one looked up.

Every rank reads; the first one writes, and the others wait until it has.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, final

from ftlib.adapters.attach import AnyModel
from ftlib.adapters.initial import InitialFactors
from ftlib.checks import PATH, check
from ftlib.data.sampler import StepSampler
from ftlib.engine.callbacks import CallbackDispatcher
from ftlib.engine.changes import differences, refuse_changes
from ftlib.engine.checkpoint import CheckpointStore
from ftlib.engine.engine import Engine, RandomState
from ftlib.engine.lock import RunLock
from ftlib.engine.manifest import PREFIX, newest_valid, read_manifest, verify
from ftlib.errors import CheckpointError, ConfigError
from ftlib.export.save import save_weights
from ftlib.models.sharding import gathered
from ftlib.trainers import snapshot
from ftlib.trainers.identity import machine
from ftlib.trainers.snapshot import Boundary, Stateful, Trained

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


@final
class Checkpoints:
    """What a run leaves in its `output_dir`; without one, nothing is written.

    Args:
        model: whose exported weights go into each checkpoint.
        engine: weights, moments, schedule and random states.
        sampler: the data cursor.
        callbacks: whose memory is kept.
        identity: the settings, data and frozen weights that must not change; asked for once.
        parts: what else has a state to keep, asked for at every checkpoint.
    """

    def __init__(
        self,
        model: AnyModel,
        engine: Engine,
        sampler: StepSampler,
        callbacks: CallbackDispatcher,
        identity: Callable[[], Mapping[str, Any]],
        parts: Callable[[], Mapping[str, Stateful]],
    ) -> None:
        self.model = model
        self.engine = engine
        self.sampler = sampler
        self.callbacks = callbacks
        self.folder = None if engine.config.output_dir is None else Path(engine.config.output_dir)
        self.saved: tuple[int, int] | None = None  # place of the last checkpoint written or resumed from
        self._make_identity = identity
        self._identity: Mapping[str, Any] | None = None
        initial = InitialFactors(model)  # of an adapter that changed its base when it was attached
        self._parts = lambda: {**parts(), **({"initial_factors": initial} if initial else {})}
        self._run_id = engine.from_first_rank(uuid.uuid4().hex[:12])
        self._resumed_from: Path | None = None

    def lock(self) -> AbstractContextManager[Any]:
        """Owns the output folder for as long as it is entered."""
        writes = self.folder is not None and self.engine.accelerator.is_main_process
        return RunLock(self.folder) if writes and self.folder is not None else nullcontext()

    def resume(self, which: bool | str | Path | None, allow_changes: Sequence[str]) -> Boundary | None:
        """Set the state of a checkpoint, and say where it stood; None for a fresh start.

        Args:
            which: None, a folder, or True for the newest that verifies, of the run written to last among
                those with these settings and data.
            allow_changes: settings that may differ from the checkpoint's; the present ones count.

        Raises:
            CheckpointError: it fails verification, or was made with other settings or data.
            ConfigError: True without an output folder.
        """
        path = self._to_resume(which, allow_changes)
        if path is None:
            return None
        manifest = verify(path)
        identity = self._settings()
        refuse_changes(manifest["config"], identity, allow_changes=allow_changes, where=str(path))
        if differing := differences(manifest["machine"], machine(self.engine)):
            logger.warning("%s: bit-identical results are not promised:\n%s", path, differing)
        changed = bool(differences(manifest["config"], identity))
        boundary, remembered = snapshot.read(path, self.engine, self.sampler, self._parts(), changed=changed)
        self.callbacks.restore_states(remembered)
        self._run_id, self._resumed_from, self.saved = manifest["run_id"], path, boundary.place
        logger.info("resuming run %s from %s at step %d", self._run_id, path, boundary.counters.step)
        return boundary

    def save(self, boundary: Boundary, *, best: bool = False) -> bool:
        """Write a checkpoint of where the run stands. Every rank takes part.

        Returns:
            Whether there is one now: not without a folder, nor where writing failed and
            `TrainConfig.on_save_error` is "warn".

        Raises:
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        if self.folder is None:
            return False
        random_states, error = self.engine.rng_states(), None
        writes = self.engine.accelerator.is_main_process
        self._settings()  # every rank takes part in it, and in what follows
        trained = Trained.of(self.engine)
        with gathered(self.model, keep=writes):
            if writes:
                try:
                    self._write(self.folder, boundary, random_states, trained, best=best)
                except CheckpointError as caught:
                    error = caught
        told = self.engine.from_first_rank("" if error is None else str(error))  # the others waited for it
        if told and self.engine.config.on_save_error == "raise":
            raise error or CheckpointError(told)
        if told:
            logger.warning("no checkpoint of step %d, training goes on: %s", boundary.counters.step, told)
            return False
        self.saved = boundary.place
        return True

    def _write(
        self,
        target: Path,
        boundary: Boundary,
        random_states: Sequence[RandomState],
        trained: Trained,
        *,
        best: bool,
    ) -> None:
        parts = self._parts()

        def write(folder: Path) -> None:
            save_weights(folder, self.model, flat=True)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
            states = self.callbacks.states()
            snapshot.write(folder, self.engine, self.sampler, boundary, states, random_states, parts, trained)

        store = CheckpointStore(
            target,
            run_id=self._run_id,
            keep=self.engine.config.keep_checkpoints,
            resumed_from=self._resumed_from,
        )
        path = store.save(
            boundary.counters.step,
            write,
            manifest={"config": self._settings(), "machine": machine(self.engine)},
            expected_bytes=snapshot.expected_bytes(self.engine, parts, boundary.phase),
            best=best,
        )
        logger.info("saved %s", path)

    def load_best(self, step: int) -> None:
        """Set the trained weights to those of this run's best checkpoint.

        Raises:
            CheckpointError: it is no longer there, or fails verification.
        """
        folder = self._resumed_from.parent if self.folder is None and self._resumed_from else self.folder
        for path in sorted(() if folder is None else folder.glob(f"{PREFIX}*"), reverse=True):
            try:
                manifest = read_manifest(path)
            except CheckpointError:  # not known to be ours
                continue
            if manifest["run_id"] == self._run_id and manifest["step"] == step and manifest["best"]:
                verify(path)
                snapshot.load_weights(path, self.engine, self._parts())
                return
        raise CheckpointError(
            f"{folder}: expected the best checkpoint, of step {step}, got none of this run. "
            "It was deleted; train without load_best to keep the weights of the last step."
        )

    def _to_resume(self, which: bool | str | Path | None, allow_changes: Sequence[str]) -> Path | None:
        if which is None or which is False:
            return None
        if which is not True:
            check("train", {"resume": (which, PATH)})
            return Path(which)
        if self.folder is None:
            raise ConfigError("train: resume=True has no folder to look in. Set TrainConfig.output_dir.")

        def matches(manifest: Mapping[str, Any]) -> bool:
            try:
                refuse_changes(manifest["config"], self._settings(), allow_changes=allow_changes)
            except (CheckpointError, ConfigError):  # raised again of the one that is taken
                return False
            return True

        found = newest_valid(self.folder, prefer=matches)
        for path, reason in found.skipped:
            logger.warning("passed over the checkpoint %s: %s", path, reason)
        if found.path is None:
            logger.warning("no checkpoint in %s to resume from: starting fresh", self.folder)
        elif len(found.runs) > 1:
            logger.warning(
                "%s holds checkpoints of %d runs: going on with %s, the newest one of the run that was "
                "written to last among those with these settings and data",
                self.folder,
                len(found.runs),
                found.path,
            )
        return found.path

    def _settings(self) -> Mapping[str, Any]:
        if self._identity is None:
            self._identity = self._make_identity()
        return self._identity
