"""Make the next items of an iterator in other threads while the present one is used."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(source: Iterator[T], pool: ThreadPoolExecutor) -> Iterator[T]:
    """Iterate over the source, whose next item the pool makes ahead, from this call on; never more than that one."""
    end = object()
    first: Future[T | object] = pool.submit(next, source, end)

    def items() -> Iterator[T]:
        upcoming = first
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, source, end)
            yield item  # type: ignore[misc]

    return items()


def prefetched(source: Iterator[T], depth: int) -> Iterator[T]:
    """Run the source in a thread, `depth` items ahead; its errors are raised here, in order."""
    ahead: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not offer(item):
                    return
            offer(None)
        except BaseException as error:  # handed over, and raised by the consumer
            offer(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
