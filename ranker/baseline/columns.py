"""Columns of the tables as arrays of N rows."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sidestack.infra.checks import check_content
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.requests import request_starts
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import TaskSpec
from sidestack.ranker.baseline.similarity import Histories
from sidestack.ranker.metrics import judged_label

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
EPOCH_WEEKDAY = 3
"""1970-01-01 was a Thursday; Monday is 0."""


def judged_labels(rows: pa.Table, tasks: Mapping[str, TaskSpec]) -> NDArray[np.int8]:
    """Return the label of each task, int8 [tasks, N]; -1 where it is not known or not all ancestors happened."""
    return np.stack([judged_label(rows, tasks, task).fill_null(-1).to_numpy() for task in tasks])


def first_entries(rows: pa.Table, name: str, number: int) -> Integers:
    """Return the first `number` entries of each list of a column, int64 [N, number]; -1 where a list is shorter."""
    lists = rows[name].combine_chunks()
    offsets_N1 = lists.offsets.to_numpy().astype(np.int64)
    places_NE = offsets_N1[:-1, None] + np.arange(number)
    values = np.append(lists.values.to_numpy(), -1)
    entries_NE: Integers = values[np.where(places_NE < offsets_N1[1:, None], places_NE, -1)]
    return entries_NE


def calendar_features(rows: pa.Table) -> dict[str, Floats]:
    """Return hour of day and weekday."""
    times_N = _microseconds(rows["event_time"])
    return {
        "hour": (times_N // HOUR_US % 24).astype(np.float32),
        "weekday": ((times_N // DAY_US + EPOCH_WEEKDAY) % 7).astype(np.float32),
    }


def histories_of(rows: pa.Table) -> Histories:
    """Return the histories of the rows' requests, each history once."""
    starts_R = request_starts(rows["request_id"])
    lists = rows["history_item_ids"].combine_chunks().take(pa.array(starts_R))
    rows_R = np.diff(np.append(starts_R, rows.num_rows))
    return Histories(lists.flatten().to_numpy(), _lengths(lists), np.repeat(np.arange(len(starts_R)), rows_R))


def since_newest(rows: pa.Table) -> Floats:
    """Return the days from the history's newest entry to the row; NaN where there is none."""
    lists = rows["history_times"].combine_chunks()
    padded = np.append(_microseconds(lists.values), 0)
    ends_N = lists.offsets.to_numpy()[1:]
    days_N = (_microseconds(rows["event_time"]) - padded[ends_N - 1]) / DAY_US
    return np.where(_lengths(lists) > 0, days_N, np.nan).astype(np.float32)


def times_in_history(rows: pa.Table) -> Floats:
    """Return how often the row's item is in its history."""
    lists = rows["history_item_ids"].combine_chunks()
    row_T = np.repeat(np.arange(rows.num_rows), _lengths(lists))
    is_item_T = lists.flatten().to_numpy() == rows["item_id"].to_numpy()[row_T]
    return np.bincount(row_T[is_item_T], minlength=rows.num_rows).astype(np.float32)


def item_categories(dataset: Dataset) -> dict[str, Integers]:
    """Return each item's category by signal, int64 [items]; -1 where it has none.

    Raises:
        DataError: a row breaks the table's contract.
    """
    content = dataset.spec.content("item")
    found = {name: np.full(content.rows, -1, np.int64) for name in content.categoricals}
    for group in row_groups([file.path for file in dataset.content_files("item")]) if found else ():
        table = read_row_group(group, (content.id_column, *found))
        check_content(table, content, group)
        ids_N = table[content.id_column].to_numpy()
        for name, of_item_I in found.items():
            of_item_I[ids_N] = table[name].fill_null(-1).to_numpy()
    return found


def _lengths(lists: pa.ListArray) -> Integers:
    lengths_N: Integers = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return lengths_N


def _microseconds(times: pa.Array | pa.ChunkedArray) -> Integers:
    values: Integers = times.cast(pa.int64()).to_numpy()
    return values
