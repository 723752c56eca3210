"""Reading a row group once for two lanes that have a part of it each."""

from collections.abc import Set
from concurrent.futures import Future

from sidestack.infra.parquet import RowGroup
from sidestack.infra.rows import Rows, RowSource


class SharedGroups:
    """Reads row groups; one that two lanes share is read by the first that asks, and left for the other.

    Its method may be called by several threads at once.

    Args of the constructor:
        source: the rows. shared: the row groups that are asked for twice an epoch.
    """

    def __init__(self, source: RowSource, shared: Set[RowGroup]) -> None:
        self._source = source
        self._shared = shared
        self._left: dict[RowGroup, Future[Rows]] = {}

    def read(self, group: RowGroup) -> Rows:
        """Return all rows of a row group.

        Raises:
            DataError: see `RowSource.read`; both lanes get the error of a shared row group.
        """
        if group not in self._shared:
            return self._source.read(group)
        own: Future[Rows] = Future()
        found = self._left.setdefault(group, own)  # one step, so that of two threads one reads
        if found is not own:
            self._left.pop(group, None)
            return found.result()
        try:
            own.set_result(self._source.read(group))
        except BaseException as error:
            own.set_exception(error)
        return own.result()
