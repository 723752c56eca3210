"""Items made ahead by other threads: how many, in what order, and where errors come out."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.prefetch import one_ahead, prefetched


def by_pool(source: Iterator[int]) -> Iterator[int]:
    with ThreadPoolExecutor(1) as pool:
        yield from one_ahead(source, pool)


def by_thread(source: Iterator[int]) -> Iterator[int]:
    return prefetched(source, depth=2)


@pytest.mark.parametrize("ahead", [by_pool, by_thread])
def test_items_come_in_order_and_then_the_error(ahead: Callable[[Iterator[int]], Iterator[int]]) -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    assert list(ahead(iter(range(7)))) == list(range(7))
    found = []
    with pytest.raises(ValueError, match="the sixth"):
        for item in ahead(failing()):
            found.append(item)
    assert found == list(range(5))


@pytest.mark.parametrize(("ahead", "made"), [(by_pool, 2), (by_thread, 4)])  # given, waiting, and by a thread in hand
def test_no_more_is_made_than_is_promised(ahead: Callable[[Iterator[int]], Iterator[int]], made: int) -> None:
    count = threading.Semaphore(0)

    def counted() -> Iterator[int]:
        for item in range(10):
            count.release()
            yield item

    items = ahead(counted())
    assert next(items) == 0
    for _ in range(made):
        assert count.acquire(timeout=10)
    assert not count.acquire(timeout=0.05)
