"""Take rows of a table in another order, for shuffling."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def take_rows(table: pa.Table, rows_N: npt.NDArray[np.int64]) -> pa.Table:
    """Return some of the table's rows in another order, in one chunk: like `pa.Table.take`, but faster.

    List columns with the same lengths, such as a history and its times, have their elements at the same positions.
    These are computed once for all such columns; Arrow computes them again for every column.

    Args:
        table: any table.
        rows_N: row numbers in [0, rows), in any order; a row may occur several times, as long as fewer than 2^31
            elements of a list column are taken.
    """
    places = _Places(rows_N)
    taken = pa.array(rows_N)
    columns = []
    for column in table.combine_chunks().columns:
        is_list = pa.types.is_list(column.type) and column.num_chunks == 1 and not column.null_count
        columns.append(places.take(column.chunk(0)) if is_list else column.take(taken))
    return pa.table(columns, schema=table.schema)


class _Places:
    """The positions of the elements of the wanted rows' lists; reused while further lists have the same offsets."""

    def __init__(self, rows_N: npt.NDArray[np.int64]) -> None:
        self._rows_N = rows_N
        self._offsets = np.empty(0, np.int32)

    def take(self, lists: pa.ListArray) -> pa.ListArray:
        """Return the wanted rows of a column that has no null lists."""
        offsets = lists.offsets.to_numpy()
        if not np.array_equal(offsets, self._offsets):
            self._offsets = offsets
            self._locate_elements()
        elements = pc.take(lists.values, self._elements, boundscheck=False)
        return pa.ListArray.from_arrays(self._taken_offsets, elements, type=lists.type)

    def _locate_elements(self) -> None:
        starts_N = self._offsets[:-1][self._rows_N]
        lengths_N = np.diff(self._offsets)[self._rows_N]
        assert lengths_N.sum(dtype=np.int64) < 2**31  # Arrow's offsets are int32
        offsets = np.zeros(len(lengths_N) + 1, np.int32)
        np.cumsum(lengths_N, out=offsets[1:])
        elements_T = np.arange(offsets[-1], dtype=np.int32)
        elements_T += np.repeat(starts_N - offsets[:-1], lengths_N)
        self._taken_offsets, self._elements = pa.array(offsets), pa.array(elements_T)
