"""A growing folder of tables, made of a share of the users of any prepared dataset.

Items come in parts, each with the items that an impression or a history of its period names first, and are numbered in
that order: what is read of the folder before a date knows no later item. Labels lie apart, as some mature later.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.code import code_digest
from sidestack.infra.commit import commit_alone
from sidestack.infra.config import digest
from sidestack.infra.impressions import HISTORY_IDS, all_columns, read_impressions
from sidestack.infra.manifest import is_committed, read_manifest
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.partitions import date_slice
from sidestack.infra.snapshot import CONTENT, Dataset
from sidestack.infra.store import FILE
from sidestack.infra.tables import SPEC_FILE, Entity, content_schema

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """What is kept of a dataset.

    Attributes:
        users: share of the users, drawn by `seed`. days: of a period, whose new items come as one part.
    """

    users: float
    days: int
    seed: int = 0


def growing_log(dataset: Dataset, cache: Path, sample: Sample) -> Path:
    """Return the folder of a dataset's sample below `cache`, written once.

    Raises:
        DataError, CommitError: a partition of the dataset was altered.
    """
    decides = {
        "dataset": read_manifest(dataset.path).digest,
        "sample": [sample.users, sample.days, sample.seed],
        "code": code_digest(["benchmarks/replay/log.py"]),
    }
    out = cache / digest(decides)[:16]
    if not is_committed(out):
        with commit_alone(out, stage="replay-log") as staging:
            _write(dataset, sample, staging)
    return out


def _write(dataset: Dataset, sample: Sample, out: Path) -> None:
    rng = np.random.default_rng(sample.seed)
    users = Numbering(dataset.spec.num_users)
    users.number(np.flatnonzero(rng.random(dataset.spec.num_users) < sample.users))
    items = Numbering(dataset.spec.num_items)
    days = dataset.dates()
    parts: dict[date, list[Ints]] = {}
    for day in days:
        named = _write_day(dataset, day, users, items, out)
        begins = days[0] + timedelta(days=(day - days[0]).days // sample.days * sample.days)
        parts.setdefault(begins, []).append(named)
    _write_content(dataset, "user", users, out / "users" / FILE, users.known)
    for begins, named_parts in parts.items():
        new = np.concatenate(named_parts)
        if len(new):
            _write_content(dataset, "item", items, out / "items" / date_slice(begins) / FILE, new)
    spec = dataset.spec.model_dump(mode="json", exclude={"num_items", "num_users"})
    (out / SPEC_FILE).write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")


class Numbering:
    """New ids of a table's rows, in the order in which they were named first.

    Args of the constructor:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self._new_I: Ints = np.full(rows, -1)
        self._count = 0

    @property
    def known(self) -> Ints:
        """The rows that have a number, in the order of their numbers."""
        rows = np.flatnonzero(self._new_I >= 0)
        ordered: Ints = rows[np.argsort(self._new_I[rows])]
        return ordered

    def number(self, rows_N: Ints) -> Ints:
        """Number rows that have no number yet, and return these, in order."""
        new: Ints = np.unique(rows_N[self._new_I[rows_N] < 0])
        self._new_I[new] = np.arange(self._count, self._count + len(new))
        self._count += len(new)
        return new

    def of(self, rows_N: Ints) -> Ints:
        """Return the numbers of rows; -1: it has none."""
        numbers: Ints = self._new_I[rows_N]
        return numbers


def _write_day(dataset: Dataset, day: date, users: Numbering, items: Numbering, out: Path) -> Ints:
    """Write a date's rows of the users that are kept, and return the items that it names first."""
    rows = pa.concat_tables(read_impressions(dataset, all_columns(dataset), day, day)).combine_chunks()
    rows = rows.filter(pa.array(users.of(_numbers(rows["user_id"])) >= 0)).combine_chunks()
    if not len(rows):
        return np.empty(0, np.int64)
    history_H = _numbers(pc.list_flatten(rows[HISTORY_IDS]))
    named = items.number(np.concatenate([_numbers(rows["item_id"]), history_H]))
    ends_N1 = np.concatenate([[0], np.cumsum(_numbers(pc.list_value_length(rows[HISTORY_IDS])))])
    history = pa.ListArray.from_arrays(pa.array(ends_N1, pa.int32()), pa.array(items.of(history_H)))
    rows = _replaced(rows, "user_id", pa.array(users.of(_numbers(rows["user_id"]))))
    rows = _replaced(rows, "item_id", pa.array(items.of(_numbers(rows["item_id"]))))
    rows = _replaced(rows, HISTORY_IDS, history)
    tasks = list(dataset.spec.tasks)
    _write_table(rows.drop_columns(tasks), out / "events" / date_slice(day) / FILE)
    _write_table(rows.select(tasks), out / "labels" / date_slice(day) / FILE)
    return named


def _write_content(dataset: Dataset, entity: Entity, numbering: Numbering, file: Path, rows_N: Ints) -> None:
    """Write rows of the items or users under their numbers."""
    content = pa.concat_tables(_content(dataset, entity)).combine_chunks().take(pa.array(rows_N))
    _write_table(_replaced(content, f"{entity}_id", pa.array(numbering.of(rows_N))), file)


def _content(dataset: Dataset, entity: Entity) -> Iterator[pa.Table]:
    names = content_schema(dataset.spec, entity).names
    for group in row_groups([file.path for file in dataset.files(CONTENT[entity])]):
        yield read_row_group(group, names)


def _write_table(table: pa.Table, file: Path) -> None:
    with TableWriter(file, table.schema) as writer:
        writer.write(table)


def _replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), values.cast(table.schema.field(name).type))


def _numbers(column: Any) -> Ints:
    values: Ints = column.to_numpy().astype(np.int64)
    return values
