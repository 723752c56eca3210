"""Prefetch the next items of an iterator in another thread while the current one is used."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


def prefetched(source: Iterator[T], depth: int = 1, pool: ThreadPoolExecutor | None = None) -> Generator[T, None, None]:
    """Iterate over a source and prefetch its next items in another thread, starting with this call.

    An error of the source is raised at the item where it occurred. Closing the iterator waits for the item being made.

    Args:
        source: makes the items, in one thread at a time.
        depth: the number of items prefetched beyond the one that was yielded last.
        pool: the threads; by default one thread of the iterator's own, which ends with it. Threads of a given pool
            could enter the source at the same time, so only one item is prefetched then.
    """
    assert depth == 1 or pool is None
    threads = pool or ThreadPoolExecutor(1, "prefetch")
    upcoming: deque[Future[Any]] = deque(threads.submit(next, source, _END) for _ in range(depth))

    def items() -> Generator[T, None, None]:
        try:
            while (item := upcoming.popleft().result()) is not _END:
                upcoming.append(threads.submit(next, source, _END))
                yield item
        finally:
            if pool is None:
                threads.shutdown(cancel_futures=True)

    return items()
