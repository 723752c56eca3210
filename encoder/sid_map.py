"""The map from item to SID on disk: one file that all ranks fill and then read.

A billion items are 8 GB a column, so the map is a memory-mapped file: what a process holds of it
is up to the page cache, not to the table's size.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

NULL = -1
"""Stands for a null SID in the map; ids are never negative."""

_BYTES = 8
_ROWS_AT_A_TIME = 1 << 20
_DISTINCT_AT_A_TIME = 1 << 24


class SidMap:
    """int64 [num_items, chunks] in a file, `NULL` where an item has no SID."""

    def __init__(self, path: Path, num_items: int, chunks: int) -> None:
        self.path = path
        self.num_items = num_items
        self.chunks = chunks

    def create(self) -> None:
        """Make the file, in its full size, so that every rank can write into its own part."""
        self.path.parent.mkdir(parents=True)
        with self.path.open("wb") as file:
            file.truncate(self.num_items * self.chunks * _BYTES)

    def write(self, start: int, ids_NC: npt.NDArray[np.int64]) -> None:
        """Write the SIDs of the items from `start` on.

        By pwrite, not through the mapping: a full disk is then an error, not a killed process.
        """
        assert ids_NC.dtype == np.int64 and ids_NC.shape[1] == self.chunks
        handle = os.open(self.path, os.O_WRONLY)
        try:
            rest, at = memoryview(ids_NC.tobytes()), start * self.chunks * _BYTES
            while rest:
                written = os.pwrite(handle, rest, at)
                rest, at = rest[written:], at + written
        finally:
            os.close(handle)

    def opened(self) -> npt.NDArray[np.int64]:
        """Map the whole for reading: int64 [num_items, chunks]."""
        return np.memmap(self.path, np.int64, "r", shape=(self.num_items, self.chunks))

    def count(self) -> tuple[int, int]:
        """Count (null SIDs, different SIDs that are not null), in bounded memory.

        More SIDs than fit are counted in several passes, each over the ids of one remainder.
        """
        ids_NC = self.opened()
        passes = -(-self.num_items // _DISTINCT_AT_A_TIME)
        nulls = distinct = 0
        for remainder in range(passes):
            found: list[npt.NDArray[np.int64]] = []
            for start in range(0, self.num_items, _ROWS_AT_A_TIME):
                part_NC = ids_NC[start : start + _ROWS_AT_A_TIME]
                nulls += int((part_NC[:, 0] == NULL).sum()) if remainder == 0 else 0
                chosen_N = (part_NC[:, 0] != NULL) & (part_NC[:, 0] % passes == remainder)
                found.append(np.unique(part_NC[chosen_N], axis=0))
            distinct += len(np.unique(np.concatenate(found), axis=0)) if found else 0
        return nulls, distinct
