"""Signals of chosen items or users, read by id."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.encoder.signals import SignalBatch, SignalSpec, signal_batch, signal_check
from sidestack.infra.errors import DataError
from sidestack.infra.revisions import read_revisions
from sidestack.infra.rows import FileRows
from sidestack.infra.snapshot import CONTENT, Dataset
from sidestack.infra.tables import Entity
from sidestack.infra.take import take_rows

Ids = npt.NDArray[np.int64]


def newest_signals(dataset: Dataset, signals: SignalSpec, ids_N: Ids) -> SignalBatch:
    """Read the newest row of each given item (user), in the given order; only row groups with such rows are decoded.

    Args:
        dataset: the snapshot. signals: which signals, of items or users.
        ids_N: at least one id, in any order.

    Raises:
        DataError: an id is not in the table, or rows break the table's contract.
    """
    rows_N = _newest_rows(dataset, signals.entity, ids_N)
    order_N = np.argsort(rows_N)
    sorted_N = rows_N[order_N]
    check = signal_check(dataset.spec, signals.entity)
    source = FileRows(dataset.content_files(signals.entity), signals.columns, check)
    parts = []
    for group in source.groups(int(sorted_N[0]), int(sorted_N[-1]) + 1):
        start, end = np.searchsorted(sorted_N, [group.start, group.start + group.rows])
        if start < end:
            parts.append(take_rows(source.table(group), sorted_N[start:end] - group.start))
    return signal_batch(take_rows(pa.concat_tables(parts), np.argsort(order_N)), signals)


def _newest_rows(dataset: Dataset, entity: Entity, ids_N: Ids) -> Ids:
    """Return the row number, over all parts, of each id's newest row."""
    entries = dataset.partitions(CONTENT[entity])
    new_P = np.array([entry.facts["new"] for entry in entries], np.int64)
    unknown_N = ids_N[(ids_N < 0) | (ids_N >= new_P.sum())]
    if len(unknown_N):
        raise DataError(f"{entity} {unknown_N[0]}: is not in {dataset.path}")
    revising_P = np.array([entry.rows for entry in entries], np.int64) - new_P  # revising rows come first in a part
    part_N = np.searchsorted(np.cumsum(new_P), ids_N, side="right")
    rows_N: Ids = ids_N + np.cumsum(revising_P)[part_N]
    revisions = read_revisions(dataset, entity)
    is_revised_N = np.isin(ids_N, revisions.ids_R)
    rows_N[is_revised_N] = revisions.rows_R[np.searchsorted(revisions.ids_R, ids_N[is_revised_N])]
    return rows_N
