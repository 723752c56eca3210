"""Impressions with their requests, labels and SIDs, row group by row group.

The i-th row groups of a date's tables hold the same requests, so a join needs no search. Labels and the SIDs of items
are row-aligned with the events. The impressions of a request share it, with the SIDs of its user and history.
"""

from collections.abc import Iterator, Sequence
from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup
from sidestack.infra.requests import request_starts
from sidestack.infra.rows import Check, FileRows, Rows
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import event_schema, label_schema, request_schema

EVENTS, REQUESTS, LABELS = "events", "requests", "labels"
REQUEST_ID = "request_id"
HISTORY_IDS = "history_item_ids"


class ImpressionRows:
    """The impressions of some dates, which share their requests: an `infra.rows.RowSource`.

    The rows of a request stay together. Row groups are those of the events files, and errors name them.

    Args:
        dataset: the snapshot. first, last: the dates, inclusive.
        columns: the columns to read, from whichever table has them.
        check: called with the rows of each table's row group, before they are joined.

    Raises:
        DataError: there are no events in the dates.
    """

    def __init__(
        self, dataset: Dataset, first: date, last: date, columns: Sequence[str], check: Check | None = None
    ) -> None:
        files = dataset.files(EVENTS, first, last)
        if not files:
            raise DataError(f"{dataset.path}: the snapshot has no events from {first} to {last}")
        self._columns = list(dict.fromkeys(columns))
        of_events, of_requests = columns_by_table(dataset, self._columns)
        self._tables = {
            table: FileRows(dataset.files(table, first, last), names, check)
            for table, names in {**of_events, **of_requests}.items()
        }
        self._of_events, self._of_requests = list(of_events), list(of_requests)
        self._number_of = {file.path: number for number, file in enumerate(files)}
        self._ends = {
            table: np.cumsum([file.rows for file in dataset.files(table, first, last)]) for table in self._tables
        }

    @property
    def num_rows(self) -> int:
        """The impressions of all dates."""
        return self._tables[EVENTS].num_rows

    @property
    def num_opened(self) -> int:
        """The number of files whose footer was read."""
        return sum(rows.num_opened for rows in self._tables.values())

    def groups(self, low: int, high: int) -> list[RowGroup]:
        """Return the row groups of the events files that hold a row of `[low, high)`; see `RowSource.groups`."""
        return self._tables[EVENTS].groups(low, high)

    def starts(self, group: RowGroup) -> npt.NDArray[np.int64]:
        """Return the rows at which requests begin, counted from the row group's first row."""
        return request_starts(self._tables[EVENTS].table(group, [REQUEST_ID])[REQUEST_ID])

    def read(self, group: RowGroup) -> Rows:
        """Return the impressions of a row group, and the requests that they share.

        Raises:
            DataError: the bytes cannot be decoded, the check refuses them, or the tables' row groups do not match.
        """
        events = self._joined(self._of_events, group, group.rows)
        own = events.select([name for name in self._columns if name in events.column_names])
        if not self._of_requests:
            return Rows(own)
        starts_R = request_starts(events[REQUEST_ID])
        requests = self._requests(group, events[REQUEST_ID].to_numpy()[starts_R])
        lengths_R = np.diff(np.append(starts_R, len(events)))
        return Rows(own, requests, np.repeat(np.arange(len(starts_R)), lengths_R))

    def joined(self, group: RowGroup) -> pa.Table:
        """Return the impressions of a row group, each with the columns of its request; errors as in `read`."""
        return self.read(group).joined(self._columns)

    def _requests(self, group: RowGroup, wanted_R: npt.NDArray[np.int64]) -> pa.Table:
        """Return the requests that belong to a row group of events; their ids must be `wanted_R`, in order."""
        requests = self._joined(self._of_requests, group, len(wanted_R))
        own_R = requests[REQUEST_ID].to_numpy()
        wrong = np.flatnonzero(own_R != wanted_R)
        if len(wrong):
            place = wrong[0]
            raise DataError(
                f"{self._own(REQUESTS, group)}: column {REQUEST_ID!r}: row {place} is request {own_R[place]}, in"
                f" {group} it is {wanted_R[place]}: the row groups of a date's tables must hold the same requests"
            )
        return requests.drop_columns(REQUEST_ID)

    def _joined(self, tables: Sequence[str], group: RowGroup, rows: int) -> pa.Table:
        """Return row-aligned tables of one row group side by side."""
        parts: list[pa.Table] = []
        for table in tables:
            own = self._own(table, group)
            if own.rows != rows:
                raise DataError(
                    f"{own}: has {own.rows} rows; {group} has {group.rows} impressions and needs {rows}:"
                    " row-aligned files must have equal row groups"
                )
            parts.append(self._tables[table].table(own))
            if tables is self._of_requests:
                _require_entries(parts[-1], parts[0], own)
        return _side_by_side(parts)

    def _own(self, table: str, group: RowGroup) -> RowGroup:
        """Return the row group of a table that corresponds to a row group of events."""
        own, events = (self._groups_beside(name, group) for name in (table, EVENTS))
        if len(own) != len(events):
            raise DataError(
                f"{own[0].path if own else table}: has {len(own)} row groups, {group.path} has {len(events)}:"
                " the files of a date's tables must have equal row groups"
            )
        return own[events.index(group)]

    def _groups_beside(self, table: str, group: RowGroup) -> list[RowGroup]:
        """Return the row groups of the file of a table that corresponds to an events file."""
        number = self._number_of[group.path]
        end = int(self._ends[table][number])
        start = int(self._ends[table][number - 1]) if number else 0
        return self._tables[table].groups(start, end) if start < end else []


def columns_by_table(dataset: Dataset, columns: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the columns to read by table: for tables with the events' rows, and for those with the requests' rows.

    A column that is in no table of the contract is read from the events' further columns.
    """
    spec = dataset.spec
    places = {name: REQUESTS for name in request_schema(spec).names if name != REQUEST_ID}
    places |= dict.fromkeys(label_schema(spec).names, LABELS)
    for name, one in dataset.snapshot.sids.items():
        places |= {column: one.table(name, base) for base, own in one.columns.items() for column in own}
    of_events: dict[str, list[str]] = {EVENTS: [REQUEST_ID]}
    of_requests: dict[str, list[str]] = {}
    for column in columns:
        table = places.get(column, EVENTS)
        is_of_requests = table == REQUESTS or table.endswith(f"/{REQUESTS}")
        if is_of_requests and not of_requests:
            of_requests[REQUESTS] = [REQUEST_ID]
        if column != REQUEST_ID:
            (of_requests if is_of_requests else of_events).setdefault(table, []).append(column)
    return of_events, of_requests


def all_columns(dataset: Dataset) -> list[str]:
    """Return all columns of the impressions that the contract or a set of SIDs defines."""
    spec = dataset.spec
    names = [*request_schema(spec).names, *event_schema(spec).names, *label_schema(spec).names]
    for one in dataset.snapshot.sids.values():
        names += [*one.columns.get(EVENTS, ()), *one.columns.get(REQUESTS, ())]
    return list(dict.fromkeys(names))


def read_impressions(
    dataset: Dataset, columns: Sequence[str], first: date = date.min, last: date = date.max, check: Check | None = None
) -> Iterator[pa.Table]:
    """Yield the joined rows of some dates, a row group at a time."""
    rows = ImpressionRows(dataset, first, last, columns, check)
    if rows.num_rows:
        for group in rows.groups(0, rows.num_rows):
            yield rows.joined(group)


def _require_entries(rows: pa.Table, requests: pa.Table, where: RowGroup) -> None:
    """Check that lists beside the requests, such as the SIDs of a history, are as long as the history.

    No-op if the history is not read.
    """
    if HISTORY_IDS not in requests.column_names:
        return
    expected = pc.list_value_length(requests[HISTORY_IDS])
    for field in rows.schema:
        if pa.types.is_list(field.type) and field.name not in requests.column_names:
            lengths = pc.list_value_length(rows[field.name])
            if lengths.null_count or not lengths.equals(expected):
                rule = f"must have as many entries as {HISTORY_IDS} in every row"
                raise DataError(f"{where}: column {field.name!r}: {rule}")


def _side_by_side(parts: Sequence[pa.Table]) -> pa.Table:
    """Join row-aligned tables; a column that several have is taken from the first."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, tuple[pa.Field, pa.ChunkedArray]] = {}
    for part in reversed(parts):
        columns |= {field.name: (field, column) for field, column in zip(part.schema, part.columns, strict=True)}
    fields, arrays = zip(*columns.values(), strict=True)
    return pa.table(list(arrays), schema=pa.schema(list(fields)))
