"""Rows for the lane reader: numbered from 0, in row groups that are read on demand.

Values that several rows share, such as a request with its history, are kept once, from disk to the batch (`Rows`).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.infra.errors import DataError
from sidestack.infra.footer import read_footer
from sidestack.infra.parquet import RowGroup, read_row_group, restored_schema
from sidestack.infra.take import take_rows

Integers = npt.NDArray[np.int64]

Check = Callable[[pa.Table, RowGroup], None]
"""Raises DataError if rows of a row group break a rule."""

OPENING_THREADS = 8
"""Footers that are read in parallel: on a network file system, reading one is mostly waiting."""


@dataclass(frozen=True)
class Rows:
    """Some rows, and the values that neighbours among them share.

    A *run* is one row of `shared` and the adjacent rows that it belongs to. Reordering rows splits runs;
    a run that is split is repeated, once for each of its parts.

    Attributes:
        own: the columns that are not shared, N rows.
        shared: the shared columns, one row per run, in the order of the rows; None: rows share nothing.
        run_N: the run of each row: from 0, each run at least once, never descending.
    """

    own: pa.Table
    shared: pa.Table | None = None
    run_N: Integers = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.own.num_rows)

    @property
    def num_runs(self) -> int:
        """The number of runs; 0 if rows share nothing."""
        return 0 if self.shared is None else int(self.shared.num_rows)

    @property
    def run_starts(self) -> Integers:
        """The row at which each run begins, int64 [runs]."""
        return np.flatnonzero(np.diff(self.run_N, prepend=-1))

    def slice(self, start: int, rows: int) -> "Rows":
        """Return some adjacent rows, without a copy."""
        own, run_N = self.own.slice(start, rows), self.run_N[start : start + rows]
        if self.shared is None:
            return Rows(own)
        first, end = (int(run_N[0]), int(run_N[-1]) + 1) if len(run_N) else (0, 0)
        return Rows(own, self.shared.slice(first, end - first), run_N - first)

    def take(self, rows_N: Integers) -> "Rows":
        """Return rows in another order; rows of one run that are still adjacent stay one run."""
        own = take_rows(self.own, rows_N)
        if self.shared is None:
            return Rows(own)
        old_N = self.run_N[rows_N]
        begins_N = np.diff(old_N, prepend=-1) != 0
        return Rows(own, take_rows(self.shared, old_N[begins_N]), np.cumsum(begins_N) - 1)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column's value for each row, whether the column is shared or not."""
        if self.shared is None or name in self.own.column_names:
            return self.own[name]
        return take_rows(self.shared.select([name]), self.run_N)[name]

    def joined(self, columns: Sequence[str]) -> pa.Table:
        """Return the rows with some columns; shared values are repeated for each row."""
        table = self.own
        if self.shared is not None:
            wanted = [name for name in self.shared.column_names if name not in table.column_names]
            repeated = take_rows(self.shared.select(wanted), self.run_N)
            for name in wanted:
                table = table.append_column(repeated.schema.field(name), repeated[name])
        return table.select(list(columns))

    def in_one_chunk(self) -> "Rows":
        """Return the rows with each column in one chunk."""
        shared = None if self.shared is None else self.shared.combine_chunks()
        return Rows(self.own.combine_chunks(), shared, self.run_N)


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Concatenate rows without a copy; runs do not continue from one part into the next."""
    if len(parts) == 1:
        return parts[0]
    own = pa.concat_tables([part.own for part in parts])
    shared = [part.shared for part in parts if part.shared is not None]
    if not shared:
        return Rows(own)
    assert len(shared) == len(parts)
    before_P = np.cumsum([0, *(part.num_runs for part in parts)])
    run_N = np.concatenate([part.run_N + before for part, before in zip(parts, before_P, strict=False)])
    return Rows(own, pa.concat_tables(shared), run_N)


class RowSource(Protocol):
    """Rows with global numbers from 0, in row groups. Its methods may be called by several threads at once."""

    @property
    def num_rows(self) -> int:
        """The number of all rows."""

    def groups(self, low: int, high: int) -> Sequence[RowGroup]:
        """Return the row groups that hold a row of `[low, high)`, a non-empty range, in order of global row numbers.

        Only the footers of the files concerned are opened, each once.
        """

    def read(self, group: RowGroup) -> Rows:
        """Return all rows of a row group that `groups` listed, after checking them.

        Raises:
            DataError: the bytes cannot be decoded, or the rows break a rule; names file, row group, column and rule.
        """

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64] | None:
        """Return the rows at which runs that stay together begin, counted from the row group's first row.

        None: no rows stay together.
        """


class CountedFile(NamedTuple):
    """A file with its number of rows from a manifest: its footer need not be read to number the rows."""

    path: Path
    rows: int


class FileRows:
    """The rows of the files of one table, one file after another. No rows stay together: see `RowSource.starts`.

    Memory: the footers that were opened, and their row groups.

    Args:
        files: in order. The constructor reads the footers of files without a known number of rows.
        columns: the columns to read.
        check: called with every row group that was read.

    Raises:
        DataError: a file cannot be opened, or has another number of rows than its manifest says, or a column has
            another type than in the file opened first.
    """

    def __init__(self, files: Sequence[Path | CountedFile], columns: Sequence[str], check: Check | None = None) -> None:
        self._paths = [file.path if isinstance(file, CountedFile) else Path(file) for file in files]
        self._columns = list(columns)
        self._check = check
        self._footers: dict[Path, pq.FileMetaData] = {}
        self._types: dict[str, tuple[Path, pa.DataType]] = {}
        self._groups: dict[int, list[RowGroup]] = {}
        self._open([file for file in files if not isinstance(file, CountedFile)])
        rows = [file.rows if isinstance(file, CountedFile) else self._footers[Path(file)].num_rows for file in files]
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])

    @property
    def num_rows(self) -> int:
        """The rows of all files."""
        return int(self._starts[-1])

    @property
    def num_opened(self) -> int:
        """The number of files whose footer was read."""
        return len(self._footers)

    def groups(self, low: int, high: int) -> list[RowGroup]:
        """Return the row groups that hold a row of `[low, high)`; see `RowSource.groups`."""
        assert 0 <= low < high <= self.num_rows
        first = int(np.searchsorted(self._starts, low, side="right")) - 1
        last = int(np.searchsorted(self._starts, high, side="left"))
        self._open(self._paths[first:last])
        groups = [group for file in range(first, last) for group in self._groups_of(file)]
        return [group for group in groups if max(low, group.start) < min(high, group.start + group.rows)]

    def read(self, group: RowGroup) -> Rows:
        """Return the rows of a row group; see `RowSource.read`."""
        return Rows(self.table(group))

    def table(self, group: RowGroup, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of a row group as a table, checked, with all columns or some of them."""
        table = read_row_group(group, columns or self._columns, self._footers[group.path])
        if self._check is not None:
            self._check(table, group)
        return table

    def starts(self, group: RowGroup) -> None:
        """Return None: no rows stay together."""
        return

    def _groups_of(self, file: int) -> list[RowGroup]:
        if file not in self._groups:
            self._groups[file] = self._listed(file)
        return self._groups[file]

    def _listed(self, file: int) -> list[RowGroup]:
        path, start, end = self._paths[file], int(self._starts[file]), int(self._starts[file + 1])
        footer = self._footers[path]
        if footer.num_rows != end - start:
            raise DataError(f"{path}: holds {footer.num_rows} rows, its manifest says {end - start}")
        rows = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        starts = np.concatenate([[start], start + np.cumsum(rows, dtype=np.int64)])
        return [RowGroup(path, index, int(starts[index]), number) for index, number in enumerate(rows)]

    def _open(self, files: Sequence[Path]) -> None:
        """Read the footers that were not read yet, and check that columns have the same types in all files."""
        new = [path for path in map(Path, files) if path not in self._footers]
        if not new:  # starting a pool takes as long as reading a footer
            return
        with ThreadPoolExecutor(OPENING_THREADS) as pool:
            for path, footer in zip(new, pool.map(read_footer, new), strict=True):
                self._require_types(path, footer)
                self._footers[path] = footer

    def _require_types(self, path: Path, footer: pq.FileMetaData) -> None:
        """Check that a file's columns have the types of the files opened before; record types of new columns."""
        for column in restored_schema(footer.schema.to_arrow_schema()):
            if column.name not in self._columns:
                continue
            known_path, known = self._types.setdefault(column.name, (path, column.type))
            if column.type != known:
                raise DataError(
                    f"{path}: column {column.name!r} is {column.type}, in {known_path} it is {known}:"
                    " all files of a table must store a column in one type"
                )
