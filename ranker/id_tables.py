"""Usage of an arm's embedding tables: possible, seen and unseen ids, rows, ids that share a row, bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.rows import Check
from sidestack.ranker.convert import rows_of, unhashed_ids
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.reader import Split

Ids = npt.NDArray[np.int64]

MAX_ROWS = 20_000_000
"""The most rows of events read to find the ids that occur; a larger log is sampled, by whole row groups."""


class DistinctIds:
    """The distinct ids among all that were added. Memory: three times the ids it holds."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.int64)
        self._new: list[Ids] = []
        self._num_new = 0

    def add(self, ids: pa.Array) -> None:
        """Add ids, none of them null."""
        unique: Ids = pc.unique(ids).to_numpy(zero_copy_only=False)
        self._new.append(unique)
        self._num_new += len(unique)
        if self._num_new > max(len(self._known), 1 << 20):  # rare enough that each id is sorted only a few times
            self._merge()

    def ids(self) -> Ids:
        """Return the distinct ids, ascending."""
        self._merge()
        return self._known

    def _merge(self) -> None:
        if self._new:
            self._known = np.unique(np.concatenate([self._known, *self._new]))
            self._new, self._num_new = [], 0


def collision_share(distinct_ids: Ids, rows: int) -> float:
    """Return the share of ids whose row, the id modulo `rows`, is also another id's row.

    Args:
        distinct_ids: the ids, each once. rows: the table's number of rows.
    """
    return shared_share(distinct_ids % rows)


def shared_share(row_N: Ids) -> float:
    """Return the share of distinct ids that share their row with another, from the row of each id."""
    if not len(row_N):
        return 0.0
    row_N = np.sort(row_N)
    is_next_N = np.append(row_N[1:] == row_N[:-1], False)
    shares_N = is_next_N | np.append(False, is_next_N[:-1])
    return float(shares_N.mean())


def describe_tables(trained: Split, held_out: Split, dim: int, max_rows: int = MAX_ROWS) -> dict[str, Any]:
    """Describe every table of an arm by the ids that occur in the impressions.

    An id that no training row has is still looked up: in its own row with initial weights, or, if the table is hashed,
    in a row that it shares.

    Args:
        trained, held_out: the splits; their rows were checked already. dim: the tables' width.
        max_rows: the most rows to read of each split.

    Returns:
        `rows_counted`, the number of training rows read, and `tables`: for each its name, whether it holds SIDs,
        possible_ids, distinct_ids (of training), rows, collision_share, bytes (of weights), held_out_ids (lookups in
        the held-out rows) and never_seen (lookups of ids that no training row has). Ids of a table that is not hashed
        share no row.
    """
    tables = trained.features.tables
    seen = {feature.column: DistinctIds() for feature in tables}
    rows_counted = 0
    for table in sample_rows(trained, _columns(tables), max_rows):
        rows_counted += table.num_rows
        for feature, ids in _ids(tables, table):
            seen[feature.column].add(pa.array(ids))
    known = {name: distinct.ids() for name, distinct in seen.items()}
    looked_up = dict.fromkeys(known, (0, 0))
    for table in sample_rows(held_out, _columns(tables), max_rows):
        for feature, ids in _ids(tables, table):
            total, never = looked_up[feature.column]
            looked_up[feature.column] = total + len(ids), never + int((~_is_in(ids, known[feature.column])).sum())
    described = [_describe_table(feature, known[feature.column], looked_up[feature.column], dim) for feature in tables]
    return {"rows_counted": rows_counted, "tables": described}


def _ids(tables: Sequence[IdFeature], rows: pa.Table) -> Iterator[tuple[IdFeature, Ids]]:
    """Yield the ids of every table in some rows."""
    for feature in tables:
        yield feature, unhashed_ids([_flat(rows[name]) for name in feature.columns], feature)


def _columns(tables: Sequence[IdFeature]) -> list[str]:
    return list(dict.fromkeys(column for feature in tables for column in feature.columns))


def sample_rows(split: Split, columns: Sequence[str], max_rows: int, check: Check | None = None) -> Iterator[pa.Table]:
    """Yield some columns of all row groups, or of evenly spaced ones of about `max_rows` rows."""
    rows = split.read(columns, check)
    total, read, at = rows.num_rows, 0, 0
    while at < total:
        (group,) = rows.groups(at, at + 1)
        yield rows.joined(group)
        read += group.rows
        # Skip ahead so that the row groups read are spread evenly over all.
        at = max(group.start + group.rows, int(read * total / min(max_rows, total)))


def _is_in(ids: Ids, rising: Ids) -> npt.NDArray[np.bool_]:
    if not len(rising):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = rising[np.searchsorted(rising, ids).clip(max=len(rising) - 1)] == ids
    return found


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """Return the ids of a column of integers or of lists of integers, without nulls."""
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return values.drop_null().combine_chunks()


def _describe_table(feature: IdFeature, ids: Ids, held_out: tuple[int, int], dim: int) -> dict[str, Any]:
    return {
        "table": feature.table,
        "is_sid": feature.is_sid,
        "possible_ids": feature.num_ids,
        "distinct_ids": len(ids),
        "rows": feature.rows,
        "collision_share": shared_share(rows_of(ids, feature)),
        "bytes": feature.rows * dim * 4,
        "held_out_ids": held_out[0],
        "never_seen": held_out[1],
    }
