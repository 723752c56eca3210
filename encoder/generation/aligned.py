"""SID columns that are row-aligned with a file: their fields, their arrays, and writing by row group."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.encoder.sid.columns import sid_columns, with_sid_metadata
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL
from sidestack.infra.parquet import RowGroup, read_row_group, row_groups
from sidestack.infra.prefetch import prefetched
from sidestack.infra.rows import CountedFile
from sidestack.infra.store import NewPartition

Columns = Callable[[pa.Table], dict[str, tuple[SidSpec, pa.Array]]]
"""A function that computes the SID columns of some rows."""


def sid_fields(columns: Mapping[str, SidSpec], kind: pa.DataType | None = None) -> list[pa.Field]:
    """Return the fields of SID columns, with their specs in the metadata; the type is int64 by default."""
    return [with_sid_metadata(pa.field(name, kind or pa.int64()), spec) for name, spec in columns.items()]


def write_aligned(
    source: CountedFile,
    columns: Sequence[str],
    check: Callable[[pa.Table, RowGroup], None],
    extend: Columns,
    made: NewPartition,
) -> None:
    """Write a file's SID columns, one row group at a time.

    While one row group is written, one thread computes the next, and another reads and checks the one after that.
    """

    def checked() -> Iterator[pa.Table]:
        for group in row_groups([source.path]):
            rows = read_row_group(group, columns)
            check(rows, group)
            yield rows

    def extended(rows: pa.Table) -> pa.Table:
        return pa.table([column for _, column in extend(rows).values()], schema=made.schema)

    ahead = prefetched(map(extended, prefetched(checked())))
    with made.open_writer(source.path.name) as writer, contextlib.closing(ahead):
        for table in ahead:
            writer.write_group(table)


def chunk_columns(
    stem: str, spec: SidSpec, ids_NC: npt.NDArray[np.int64], offsets: npt.NDArray[np.int32] | None = None
) -> dict[str, tuple[SidSpec, pa.Array]]:
    """Return one column per chunk, by name, as values, or as lists where offsets are given."""
    found = {}
    for chunk, (name, column_spec) in enumerate(sid_columns(stem, spec).items()):
        ids_N = np.ascontiguousarray(ids_NC[:, chunk])
        column = pa.array(ids_N, mask=ids_NC[:, 0] == NULL)
        if offsets is not None:
            column = pa.ListArray.from_arrays(pa.array(offsets), column)
        found[name] = (column_spec, column)
    return found
