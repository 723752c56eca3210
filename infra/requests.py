"""Joined rows, with the rows of a request adjacent: cut into groups of whole requests, and split into tables."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sidestack.infra.errors import DataError
from sidestack.infra.row_bytes import row_bytes
from sidestack.infra.tables import DatasetSpec, event_schema, flat_schema, label_schema, request_schema
from sidestack.infra.take import take_rows

Ints = npt.NDArray[np.int64]


def request_starts(request_ids: pa.ChunkedArray) -> Ints:
    """Return the first row of each request, whose rows are adjacent: int64 [requests]."""
    ids_N = request_ids.to_numpy()
    if not len(ids_N):
        return np.empty(0, np.int64)
    return np.flatnonzero(np.concatenate([[True], ids_N[1:] != ids_N[:-1]]))


def request_groups(chunks: Iterable[pa.Table], row_group_bytes: int) -> Iterator[pa.Table]:
    """Cut rows into groups of whole requests; a group ends with the request that reaches `row_group_bytes`.

    The groups depend on the rows alone, not on how they are cut into chunks.
    """
    pending: pa.Table | None = None
    for chunk in chunks:
        pending = chunk if pending is None else pa.concat_tables([pending, chunk])
        cuts = _cuts(pending, row_group_bytes)
        for start, end in zip([0, *cuts], cuts, strict=False):
            yield pending.slice(start, end - start).combine_chunks()
        if cuts:
            pending = pending.slice(cuts[-1]).combine_chunks()  # a slice would keep the written rows in memory
    if pending is not None:
        yield pending.combine_chunks()


def _cuts(rows: pa.Table, row_group_bytes: int) -> list[int]:
    """Return the ends of groups; more rows may follow, so a request ends only where the next one begins."""
    starts_R = request_starts(rows["request_id"])
    ends_N = np.cumsum(row_bytes(rows))
    before_R = np.concatenate([[0], ends_N])[starts_R]  # bytes before each request
    cuts: list[int] = []
    reached = 0
    while True:
        place = int(np.searchsorted(before_R, reached + row_group_bytes))
        if place >= len(starts_R):
            return cuts
        cuts.append(int(starts_R[place]))
        reached = int(before_R[place])


def split_rows(rows: pa.Table, spec: DatasetSpec, where: str) -> dict[str, pa.Table]:
    """Split joined rows into requests, events and labels.

    Raises:
        DataError: rows of one request differ in a column of the requests table.
    """
    of_request = request_schema(spec).names
    starts_R = request_starts(rows["request_id"])
    requests = take_rows(rows.select(of_request), starts_R)
    _require_equal(rows.select(of_request), requests, starts_R, where)
    further = [name for name in rows.column_names if name not in flat_schema(spec).names]
    return {
        "requests": requests,
        "events": rows.select([*event_schema(spec).names, *further]),
        "labels": rows.select(label_schema(spec).names),
    }


def _require_equal(rows: pa.Table, requests: pa.Table, starts_R: Ints, where: str) -> None:
    if len(starts_R) == rows.num_rows:
        return
    request_N = np.repeat(np.arange(len(starts_R)), np.diff(np.append(starts_R, rows.num_rows)))
    repeated = take_rows(requests, request_N)
    for name in rows.column_names:
        if not rows[name].equals(repeated[name]):
            values = zip(rows[name].to_pylist(), repeated[name].to_pylist(), strict=True)
            row = next(row for row, (found, expected) in enumerate(values) if found != expected)
            raise DataError(
                f"{where}: column {name!r}: must be equal in all rows of a request; request"
                f" {rows['request_id'][row].as_py()} has {rows[name][row].as_py()} and {repeated[name][row].as_py()}"
            )


def require_distinct(request_ids_R: Ints, where: str) -> None:
    """Check that no request of a date occurs twice."""
    sorted_R = np.sort(request_ids_R)
    twice = np.flatnonzero(sorted_R[1:] == sorted_R[:-1])
    if len(twice):
        raise DataError(
            f"{where}: column 'request_id': request {sorted_R[twice[0]]} comes twice; the rows of a request must lie"
            " together, and no two requests of a date may share an id"
        )
