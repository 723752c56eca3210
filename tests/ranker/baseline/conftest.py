"""What the baseline's tests start with."""

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Fit on one thread: a few hundred rows wait longer for a busy core than they take."""
    with threadpool_limits(1, user_api="openmp"):
        yield
