"""The map from id to SID on disk: a file next to the SID columns of each part of the items or users.

A billion items are 8 GB per column, so the map is a memory-mapped file: a process's memory depends on the page cache,
not on the table's size.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sidestack.infra.errors import CommitError
from sidestack.infra.manifest import verify_file
from sidestack.infra.partitions import PartitionEntry

Ids = npt.NDArray[np.int64]

MAP_FILE = "map.int64"
"""The map's name in a part's partition of SIDs."""
NULL = -1
"""The value of a null SID in the map; ids are never negative."""

_BYTES = 8
_ROWS_AT_A_TIME = 1 << 18
_DISTINCT_AT_A_TIME = 1 << 20
_MIX = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio: multiplying by it scatters the high bits, whatever pattern the ids have."""


class SidMap:
    """A file of int64 [rows, chunks], `NULL` where an item or user has no SID."""

    def __init__(self, path: Path, rows: int, chunks: int) -> None:
        self.path = path
        self.rows = rows
        self.chunks = chunks

    def create(self) -> None:
        """Create the file in its full size, so that every rank can write its own part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            file.truncate(self.rows * self.chunks * _BYTES)

    def write(self, start: int, ids_NC: Ids) -> None:
        """Write the SIDs of the items from `start` on.

        With pwrite, not through the mapping: a full disk then raises an error instead of killing the process.
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


class SidCounts(NamedTuple):
    """Counts of a table's null, distinct and unshared SIDs.

    Attributes:
        null: rows without a SID. distinct: distinct SIDs. alone: rows that share their whole SID with no other row.
    """

    null: int
    distinct: int
    alone: int


class SidMaps:
    """The maps of all parts, read as one: id -> SID.

    Args:
        parts: for each part its first id, the number of ids it adds, and its map's file; in order of ids.
        chunks: number of columns per SID.
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

    def count(self, folder: Path) -> SidCounts:
        """Count null, distinct and unshared SIDs, in bounded memory.

        A hash distributes the SIDs over files small enough to be sorted; equal SIDs are in the same file.
        All SIDs are read once, and each file is written and read once.

        Args:
            folder: for these files, which are removed afterwards.
        """
        shares = -(-self.rows // _DISTINCT_AT_A_TIME)
        files = [folder / f"sids.share-{share}" for share in range(shares)]
        null = distinct = alone = 0
        for part_NC in self.pieces():
            present_N = part_NC[:, 0] != NULL
            null += len(part_NC) - int(present_N.sum())
            _distribute_by_hash(_keep_two_of_each(part_NC[present_N]), files)
        for file in files:
            if file.exists():
                sorted_NC = _keep_two_of_each(np.fromfile(file, np.int64).reshape(-1, self.chunks))
                is_first_N = _differ_from_before(sorted_NC, 1)
                distinct += int(is_first_N.sum())
                alone += int((is_first_N & np.append(is_first_N[1:], True)).sum())
                file.unlink()
        return SidCounts(null, distinct, alone)

    def pieces(self) -> Iterator[Ids]:
        """Yield the SIDs in the order of ids, int64 [rows, chunks] each, read a bounded number of rows at a time."""
        # Read, not mapped: the pages of a mapping count as this process's memory.
        for _, all_rows, path in self._parts:
            with path.open("rb") as file:
                for start in range(0, all_rows, _ROWS_AT_A_TIME):
                    rows = min(_ROWS_AT_A_TIME, all_rows - start)
                    yield np.fromfile(file, np.int64, rows * self.chunks).reshape(rows, self.chunks)


def sid_maps(store: Path, parts: Sequence[PartitionEntry], chunks: int) -> SidMaps:
    """Open the maps of the partitions that hold the SIDs of the parts of the items or users.

    Args:
        store: the directory of the partitions. parts: of one set and generation, in order.
        chunks: number of columns per SID.
    """
    for entry in parts:
        _require_whole(store / entry.path, entry.digest)
    files = [(entry.facts["first"], entry.facts["new"], store / entry.path / MAP_FILE) for entry in parts]
    return SidMaps(files, chunks)


@functools.cache  # a part's map is opened again for each later part
def _require_whole(partition: Path, digest: str) -> None:
    """Check all bytes of a partition's map."""
    if verify_file(partition, MAP_FILE).digest != digest:
        raise CommitError(f"{partition}: is another partition than the snapshot lists")


def _keep_two_of_each(ids_NC: Ids) -> Ids:
    """Sort SIDs and keep at most two of each: enough to count the distinct and the shared ones."""
    # Nearly every SID is one number. Sorting numbers is many times faster than np.unique, which hashes, or lexsort.
    sorted_NC = np.sort(ids_NC, axis=0) if ids_NC.shape[1] == 1 else ids_NC[np.lexsort(ids_NC.T)]
    return sorted_NC[_differ_from_before(sorted_NC, 2)]


def _differ_from_before(sorted_NC: Ids, places: int) -> npt.NDArray[np.bool_]:
    """Return whether each SID differs from the one `places` before it."""
    differ_N = np.ones(len(sorted_NC), bool)
    differ_N[places:] = (sorted_NC[places:] != sorted_NC[:-places]).any(axis=1)
    return differ_N


def _distribute_by_hash(ids_NC: Ids, files: Sequence[Path]) -> None:
    """Append each SID to the file chosen by the hash of its first number."""
    mixed_N = ids_NC[:, 0].astype(np.uint64) * _MIX >> np.uint64(40)
    share_N = (mixed_N % np.uint64(len(files))).astype(np.uint16 if len(files) <= 2**16 else np.int64)
    order_N = np.argsort(share_N, kind="stable")
    ends = np.cumsum(np.bincount(share_N, minlength=len(files)))
    for file, part_NC in zip(files, np.split(ids_NC[order_N], ends[:-1]), strict=True):
        if len(part_NC):
            with file.open("ab") as out:
                out.write(part_NC.tobytes())
