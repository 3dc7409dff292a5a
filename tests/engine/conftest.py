"""One thread for all tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.trainers import tiny


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """For all tests of this package."""
    with tiny.one_thread():
        yield
