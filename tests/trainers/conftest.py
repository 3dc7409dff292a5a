"""One thread for all, and the run that nothing interrupted, made once per way of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.trainers import tiny
from tests.trainers.runs import CUTS, WAYS, Run, run


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """For all tests of this package."""
    with tiny.one_thread():
        yield


@pytest.fixture(scope="package")
def uninterrupted() -> Callable[[str, str], Run]:
    """`uninterrupted(way, cut)`: names of `WAYS` and `CUTS`."""
    made: dict[tuple[str, str], Run] = {}

    def get(way: str, cut: str) -> Run:
        if (way, cut) not in made:
            made[way, cut] = run(None, max_tokens=CUTS[cut], **WAYS[way])
        return made[way, cut]

    return get
