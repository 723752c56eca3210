"""Writing beside other work: a thread writes what was handed over last while the next is being made."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import pyarrow as pa


class WriteBehind:
    """Call `write` with one table after the other, in a thread of its own, one table behind.

    Memory: the table that is being written. An error of `write` is raised by the next call, or at the end.
    """

    def __init__(self, write: Callable[[pa.Table], None]) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write-behind")
        self._last: Future[None] | None = None

    def __call__(self, table: pa.Table) -> None:
        """Hand a table over, once the one before is written.

        Raises:
            whatever `write` raised on the one before.
        """
        self._finish()
        self._last = self._pool.submit(self._write, table)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last table, after an error too, but raise what `write` raised only where there is none."""
        self._pool.shutdown(wait=True)
        if kind is None:
            self._finish()
