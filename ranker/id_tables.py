"""How an arm's embedding tables are used: ids possible, seen and never seen, rows, ids that share a row, bytes."""

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
"""The most rows of events that are read to see which ids occur; more of them are sampled, by whole row groups."""


class DistinctIds:
    """The different ids among all that were added. Memory: three times the ids it holds."""

    def __init__(self) -> None:
        self._known = np.empty(0, np.int64)
        self._new: list[Ids] = []
        self._num_new = 0

    def add(self, ids: pa.Array) -> None:
        """Add ids, none of them null."""
        unique: Ids = pc.unique(ids).to_numpy(zero_copy_only=False)
        self._new.append(unique)
        self._num_new += len(unique)
        if self._num_new > max(len(self._known), 1 << 20):  # seldom enough for each id to be sorted a few times only
            self._merge()

    def ids(self) -> Ids:
        """Return them, rising."""
        self._merge()
        return self._known

    def _merge(self) -> None:
        if self._new:
            self._known = np.unique(np.concatenate([self._known, *self._new]))
            self._new, self._num_new = [], 0


def collision_share(distinct_ids: Ids, rows: int) -> float:
    """Return the share of ids whose row, the id modulo `rows`, is another id's row as well.

    Args:
        distinct_ids: the ids, each once. rows: the table's.
    """
    return shared_share(distinct_ids % rows)


def shared_share(row_N: Ids) -> float:
    """Return the share of different ids whose row is another's as well, by the row of each."""
    if not len(row_N):
        return 0.0
    row_N = np.sort(row_N)
    is_next_N = np.append(row_N[1:] == row_N[:-1], False)
    shares_N = is_next_N | np.append(False, is_next_N[:-1])
    return float(shares_N.mean())


def describe_tables(trained: Split, held_out: Split, dim: int, max_rows: int = MAX_ROWS) -> dict[str, Any]:
    """Describe every table of an arm by the ids that occur in the impressions.

    An id that no training row has is still looked up: in a row of its own that is as it was initialized, or, where
    the table is hashed, in one that it shares.

    Args:
        trained, held_out: the splits; their rows were checked already. dim: the tables' width.
        max_rows: the most rows to read of either.

    Returns:
        `rows_counted`, the training rows that were read, and `tables`: for each its name, whether it holds SIDs,
        possible_ids, distinct_ids (of training), rows, collision_share, bytes (of weights), held_out_ids (lookups in
        the held-out rows) and never_seen (those of an id that no training row has). Ids of a table that is not hashed
        share no row.
    """
    tables = trained.features.tables
    seen = {feature.column: DistinctIds() for feature in tables}
    rows_counted = 0
    for table in sampled(trained, _columns(tables), max_rows):
        rows_counted += table.num_rows
        for feature, ids in _ids(tables, table):
            seen[feature.column].add(pa.array(ids))
    known = {name: distinct.ids() for name, distinct in seen.items()}
    looked_up = dict.fromkeys(known, (0, 0))
    for table in sampled(held_out, _columns(tables), max_rows):
        for feature, ids in _ids(tables, table):
            total, never = looked_up[feature.column]
            looked_up[feature.column] = total + len(ids), never + int((~_is_in(ids, known[feature.column])).sum())
    described = [_described(feature, known[feature.column], looked_up[feature.column], dim) for feature in tables]
    return {"rows_counted": rows_counted, "tables": described}


def _ids(tables: Sequence[IdFeature], rows: pa.Table) -> Iterator[tuple[IdFeature, Ids]]:
    """Yield the ids of every table in some rows."""
    for feature in tables:
        yield feature, unhashed_ids([_flat(rows[name]) for name in feature.columns], feature)


def _columns(tables: Sequence[IdFeature]) -> list[str]:
    return list(dict.fromkeys(column for feature in tables for column in feature.columns))


def sampled(split: Split, columns: Sequence[str], max_rows: int, check: Check | None = None) -> Iterator[pa.Table]:
    """Yield some columns of all row groups, or of evenly spaced ones of about `max_rows` rows."""
    rows = split.read(columns, check)
    total, read, at = rows.num_rows, 0, 0
    while at < total:
        (group,) = rows.groups(at, at + 1)
        yield rows.joined(group)
        read += group.rows
        # The next one lies as far on as leaves the rows that are read spread over all.
        at = max(group.start + group.rows, int(read * total / min(max_rows, total)))


def _is_in(ids: Ids, rising: Ids) -> npt.NDArray[np.bool_]:
    if not len(rising):
        return np.zeros(len(ids), bool)
    found: npt.NDArray[np.bool_] = rising[np.searchsorted(rising, ids).clip(max=len(rising) - 1)] == ids
    return found


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """Return the ids of a column of integers or of lists of them; nulls count for nothing."""
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return values.drop_null().combine_chunks()


def _described(feature: IdFeature, ids: Ids, held_out: tuple[int, int], dim: int) -> dict[str, Any]:
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
