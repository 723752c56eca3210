"""Prefetching items by other threads: their number, their order and errors."""

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from sidestack.infra.prefetch import prefetched

Prefetch = Callable[[Iterator[int]], Iterator[int]]


def by_pool(source: Iterator[int]) -> Iterator[int]:
    with ThreadPoolExecutor(2) as pool:
        yield from prefetched(source, pool=pool)


WAYS = {"a pool, one ahead": (by_pool, 1), "one": (prefetched, 1), "three": (partial(prefetched, depth=3), 3)}
every_way = pytest.mark.parametrize(("prefetch", "depth"), WAYS.values(), ids=WAYS)


@every_way
def test_items_are_in_order_and_followed_by_the_error(prefetch: Prefetch, depth: int) -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    assert list(prefetch(iter(range(7)))) == list(range(7))
    found = []
    with pytest.raises(ValueError, match="the sixth"):
        for item in prefetch(failing()):
            found.append(item)
    assert found == list(range(5))


@every_way
def test_at_most_depth_items_are_prefetched(prefetch: Prefetch, depth: int) -> None:
    made = threading.Semaphore(0)

    def counted() -> Iterator[int]:
        for item in range(10):
            made.release()
            yield item

    items = prefetch(counted())
    for expected in range(3):
        assert next(items) == expected
        for _ in range(1 + depth if expected == 0 else 1):
            assert made.acquire(timeout=10)
        assert not made.acquire(timeout=0.05)


def test_first_items_are_prefetched_before_the_first_request() -> None:
    made = threading.Event()

    def source() -> Iterator[int]:
        made.set()
        yield 0

    items = prefetched(source())
    assert made.wait(10)
    assert list(items) == [0]


def test_one_thread_makes_all_items_and_ends_with_the_iterator() -> None:
    threads: set[threading.Thread] = set()

    def source() -> Iterator[int]:
        for item in range(20):
            threads.add(threading.current_thread())
            yield item

    items = prefetched(source(), depth=3)
    assert [next(items) for _ in range(5)] == list(range(5))
    (thread,) = threads
    assert thread is not threading.current_thread() and thread.is_alive()
    assert isinstance(items, Generator)
    items.close()
    assert not thread.is_alive()
