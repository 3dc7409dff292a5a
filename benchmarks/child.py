"""A process of its own for every job: `python -m benchmarks.child KIND JOB.json ANSWER.json`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine, records
from benchmarks.jobs import JOBS, Evaluate, Prepare, Prepared, Train
from benchmarks.tasks import task_named

__all__: list[str] = []


def main(kind: str, job_file: str, answer_file: str) -> None:
    """Do one job and write its answer."""
    records.write(Path(answer_file), _answer(records.read(Path(job_file), JOBS[kind])))


def _answer(job: Any) -> Any:
    task = task_named(job.task)
    if isinstance(job, Prepare):
        described = machine.describe(size=job.matmul_size, copy_bytes=job.copy_bytes)
        return Prepared(described, task.prepare(job))
    if isinstance(job, Train):
        return replace(task.sides[job.side](job), versions=machine.versions())
    assert isinstance(job, Evaluate)
    return task.evaluate(job)


if __name__ == "__main__":
    main(*sys.argv[1:])
