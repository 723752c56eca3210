"""Counts of the ids of tables with admission on the training dates, and the resulting rows.

Rank 0 reads only the columns of these ids, a row group at a time, and writes a file that every rank reads. So the rows
are the same for any number of ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.distributed import World, raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.impressions import columns_by_table
from sidestack.infra.rows import FileRows
from sidestack.ranker.admission import IdRows, Integers, Turnover
from sidestack.ranker.config import AdmissionConfig
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.reader import Split, check_rows
from sidestack.ranker.row_maps import read_id_rows, write_id_rows


class IdCounts(NamedTuple):
    """The distinct ids of a column in some rows, and how often each occurs."""

    column: str
    ids: Integers
    counts: Integers


def admit_ids(
    folder: Path, split: Split, admission: Mapping[str, AdmissionConfig], earlier: Path | None, world: World
) -> dict[str, Turnover]:
    """Decide which ids have rows of their own, and write the result to a shared folder; every rank must call.

    A date that the earlier ranker counted is not counted again.

    Args:
        folder: the model's folder, shared by all ranks; created if it is missing. split: the training rows.
        admission: by column. earlier: the folder of the ranker that the training starts from; None: there is none.
        world: the process group.

    Returns:
        The changes, by column; empty on ranks other than 0.

    Raises:
        DataError: rows break the contract, the earlier ranker's file cannot be read, or it has more ids.
    """
    changed: dict[str, Turnover] = {}
    with raise_on_all_ranks(world, "giving rows to ids"):
        if world.is_main and admission:
            known = {column: IdRows.empty() for column in admission}
            if earlier is not None:
                known = read_id_rows(earlier, admission)
            changed = _admit(known, split, admission)
            folder.mkdir(exist_ok=True)
            write_id_rows(known, folder)
    return changed


def _admit(known: Mapping[str, IdRows], split: Split, admission: Mapping[str, AdmissionConfig]) -> dict[str, Turnover]:
    """Count the ids of new training dates, then evict and admit ids, in place."""
    for feature in split.features.tables:
        if feature.column in admission:
            _grow(known[feature.column], feature, split)
    counted_to = {column: ids.counted_to for column, ids in known.items()}
    days = sorted({entry.date for entry in split.entries("events")})
    for day in days:
        columns = [column for column, last in counted_to.items() if day.toordinal() > last]
        for seen in count_ids(split, columns, day):
            known[seen.column].add_counts(seen.ids, seen.counts, day)
    changed = {}
    for column, ids in known.items():
        today = max(days[-1].toordinal(), ids.counted_to)
        changed[column] = ids.admit(admission[column], date.fromordinal(today))
    return changed


def _grow(ids: IdRows, feature: IdFeature, split: Split) -> None:
    if len(ids.row_I) > feature.num_ids:
        raise DataError(
            f"{split.dataset.path}: column {feature.column!r} has {feature.num_ids} ids, the ranker that the training"
            f" starts from knows {len(ids.row_I)}: ids of a dataset may only become more"
        )
    ids.grow(feature.num_ids, feature.fallback_rows)


def count_ids(split: Split, columns: Sequence[str], day: date) -> Iterator[IdCounts]:
    """Yield the ids of some columns on one date, a row group at a time; ids of a request count once per request.

    Raises:
        DataError: rows break the contract.
    """
    check = partial(check_rows, features=split.features, spec=split.dataset.spec)
    of_events, of_requests = columns_by_table(split.dataset, columns)
    for table, stored in {**of_events, **of_requests}.items():
        wanted = [column for column in stored if column in columns]
        rows = FileRows(split.dataset.files(table, day, day), wanted, check)
        if not wanted or not rows.num_rows:
            continue
        for group in rows.groups(0, rows.num_rows):
            read = rows.table(group)
            yield from (_count_values(column, read[column]) for column in wanted)


def _count_values(column: str, values: pa.ChunkedArray) -> IdCounts:
    ids = pc.list_flatten(values) if pa.types.is_list(values.type) else values
    found = pc.value_counts(ids.drop_null())
    return IdCounts(column, found.field("values").to_numpy(), found.field("counts").to_numpy())
