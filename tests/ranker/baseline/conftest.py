"""Fixture of the baseline's tests: fits run on one thread."""

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Run fits on one thread: with a few hundred rows, waiting for a busy core takes longer than the fit."""
    with threadpool_limits(1, user_api="openmp"):
        yield
