"""The map from id to SID on disk: a file beside the SID columns of each part of the items or users.

A billion items are 8 GB a column, so the map is a memory-mapped file: what a process holds of it
is up to the page cache, not to the table's size.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from infra.partitions import PartitionEntry

Ids = npt.NDArray[np.int64]

MAP_FILE = "map.int64"
"""The map's name in a part's partition of SIDs."""
NULL = -1
"""Stands for a null SID in the map; ids are never negative."""

_BYTES = 8
_ROWS_AT_A_TIME = 1 << 18
_DISTINCT_AT_A_TIME = 1 << 20
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: the high bits of a product with it are scattered, whatever ids have in common."""


class SidMap:
    """int64 [rows, chunks] in a file, `NULL` where an item or user has no SID."""

    def __init__(self, path: Path, rows: int, chunks: int) -> None:
        self.path = path
        self.rows = rows
        self.chunks = chunks

    def create(self) -> None:
        """Make the file, in its full size, so that every rank can write into its own part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            file.truncate(self.rows * self.chunks * _BYTES)

    def write(self, start: int, ids_NC: Ids) -> None:
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


class SidMaps:
    """The maps of all parts, read as one: id -> SID.

    Args:
        parts: for each part its first id, how many ids it brings, and its map's file; in order of ids.
        chunks: columns that a SID takes.
    """

    def __init__(self, parts: Sequence[tuple[int, int, Path]], chunks: int) -> None:
        self._parts = [(first, rows, path) for first, rows, path in parts if rows]
        self._firsts = np.array([first for first, _, _ in self._parts], np.int64)
        self.chunks = chunks
        self.rows = sum(rows for _, rows, _ in self._parts)
        self._opened = [np.memmap(path, np.int64, "r", shape=(rows, chunks)) for _, rows, path in self._parts]

    def of(self, ids_N: Ids) -> Ids:
        """Return the SIDs of ids, int64 [N, chunks], `NULL` where an item or user has none."""
        if len(self._opened) == 1:
            return np.asarray(self._opened[0][ids_N])
        sids_NC = np.empty((len(ids_N), self.chunks), np.int64)
        part_N = np.searchsorted(self._firsts, ids_N, side="right") - 1
        for part in np.unique(part_N):
            is_own_N = part_N == part
            sids_NC[is_own_N] = self._opened[part][ids_N[is_own_N] - self._firsts[part]]
        return sids_NC

    def count(self, folder: Path) -> tuple[int, int]:
        """Count (null SIDs, different SIDs that are not null), in bounded memory.

        The SIDs are shared out by a hash into files small enough to be sorted; equal SIDs meet in one file.
        Everything is read, and where it does not fit written, once.

        Args:
            folder: for these files, which are removed again.
        """
        shares = -(-self.rows // _DISTINCT_AT_A_TIME)
        files = [folder / f"sids.share-{share}" for share in range(shares)]
        nulls = distinct = 0
        for part_NC in self._pieces():
            present_N = part_NC[:, 0] != NULL
            nulls += len(part_NC) - int(present_N.sum())
            _share_out(_different(part_NC[present_N]), files)
        for file in files:
            if file.exists():
                distinct += len(_different(np.fromfile(file, np.int64).reshape(-1, self.chunks)))
                file.unlink()
        return nulls, distinct

    def _pieces(self) -> Iterator[Ids]:
        # Read, not mapped: pages of a mapping count as this process's memory.
        for _, all_rows, path in self._parts:
            with path.open("rb") as file:
                for start in range(0, all_rows, _ROWS_AT_A_TIME):
                    rows = min(_ROWS_AT_A_TIME, all_rows - start)
                    yield np.fromfile(file, np.int64, rows * self.chunks).reshape(rows, self.chunks)


def open_maps(store: Path, parts: Sequence[PartitionEntry], chunks: int) -> SidMaps:
    """Open the map from id to SID over partitions of the SIDs of items or users, in order."""
    of_parts = [(part.facts["first"], part.facts["new"], store / part.path / MAP_FILE) for part in parts]
    return SidMaps(of_parts, chunks)


def _different(ids_NC: Ids) -> Ids:
    # Nearly every SID is one number; sorting those is many times faster than np.unique, which hashes, and than rows.
    if ids_NC.shape[1] > 1:
        return np.unique(ids_NC, axis=0)
    sorted_N1 = np.sort(ids_NC, axis=0)
    is_first_N = np.ones(len(sorted_N1), bool)
    is_first_N[1:] = sorted_N1[1:, 0] != sorted_N1[:-1, 0]
    return sorted_N1[is_first_N]


def _share_out(ids_NC: Ids, files: Sequence[Path]) -> None:
    """Append each SID to the file that its first number's hash gives."""
    mixed_N = ids_NC[:, 0].astype(np.uint64) * _MIX >> np.uint64(40)
    share_N = (mixed_N % np.uint64(len(files))).astype(np.uint16 if len(files) <= 2**16 else np.int64)
    order_N = np.argsort(share_N, kind="stable")
    ends = np.cumsum(np.bincount(share_N, minlength=len(files)))
    for file, part_NC in zip(files, np.split(ids_NC[order_N], ends[:-1]), strict=True):
        if len(part_NC):
            with file.open("ab") as out:
                out.write(part_NC.tobytes())
