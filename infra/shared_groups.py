"""Read a row group once for two lanes that each own a part of it."""

from collections.abc import Set
from concurrent.futures import Future

from sidestack.infra.parquet import RowGroup
from sidestack.infra.rows import Rows, RowSource


class SharedGroups:
    """A reader of row groups; the first of two lanes that share a row group reads it, and keeps it for the second.

    Its method may be called by several threads at once.

    Args of the constructor:
        source: the rows. shared: the row groups that are read twice per epoch.
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
        found = self._left.setdefault(group, own)  # atomic, so that only one of two threads reads
        if found is not own:
            self._left.pop(group, None)
            return found.result()
        try:
            own.set_result(self._source.read(group))
        except BaseException as error:
            own.set_exception(error)
        return own.result()
