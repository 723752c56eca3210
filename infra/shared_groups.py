"""Read a row group once for two lanes that each own a part of it.

Example: two lanes over three row groups of four rows. The lanes' bound cuts row group 1:

    rows         0 1 2 3 4 5 6 7 8 9 10 11
    row groups  |   0   |   1   |    2    |
    lanes       |     0     |      1      |

    lane 0   reads row group 0               rows 0 to 3
    lane 1   reads row group 1, keeps it     rows 6 and 7
    lane 0   takes the kept row group 1      rows 4 and 5; it is no longer kept
    lane 1   reads row group 2               rows 8 to 11

Whichever lane comes first reads; if the other comes while the first still reads, it waits.
"""

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
