"""The tables' contract: what `items`, `users` and `events` hold, and the checks that hold them to it.

A dataset is a directory:

    dataset.json                               the DatasetSpec: signals, features, splits
    items/part-00000.parquet                   one row an item, item_id = row number
    users/part-00000.parquet                   one row a user, user_id = row number
    events/date=2017-09-10/part-00000.parquet  one row an impression, by the date of its event_time

Embeddings are fixed-size lists, which lie in Parquet as plain lists that remember their size (infra/parquet.py).
Columns beyond the contract are carried along untouched; that is how SID columns travel.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from infra.config import Config, parse
from infra.errors import DataError
from infra.parquet import RowGroup

SPEC_FILE = "dataset.json"
TIME = pa.timestamp("us")
TASKS = ("click", "conversion")
Entity = Literal["item", "user"]
"""What has content signals, and so can have Semantic IDs."""
EVENT_COLUMNS = ("event_time", "user_id", "item_id", "history_item_ids", "history_times")
"""The columns every events table has, beside the labels, dense and sparse ones its spec names."""


class ContentSpec(NamedTuple):
    """The content signals of one table: that of the items, or of the users.

    Attributes:
        id_column: its ids, which are row numbers. rows: how many there are.
        embeddings: embedding signals, name -> dimensions. categoricals: name -> cardinality.
    """

    id_column: str
    rows: int
    embeddings: Mapping[str, int]
    categoricals: Mapping[str, int]


class TaskSpec(Config):
    """One thing to predict: an int8 label column, 0 or 1, null where it is not (or not yet) known.

    Where the label of the task it is given is 0, its own is 0 as well, once it is known.
    """

    given: str | None = None
    """The task that must have happened for this one to be asked: its probability is p(task | given = 1), and it is
    judged on rows whose `given` label is 1. None: it is asked of every row."""
    weight: PositiveFloat = 1.0
    """Weight of its loss beside the other tasks'."""


def ancestors(tasks: Mapping[str, TaskSpec], task: str) -> tuple[str, ...]:
    """Return the tasks that must have happened for a task to be asked, nearest first."""
    found: list[str] = []
    parent = tasks[task].given
    while parent is not None:
        found.append(parent)
        parent = tasks[parent].given
    return tuple(found)


class DatasetSpec(Config):
    """What a dataset holds, beside the columns every dataset has (ids, times, history)."""

    embeddings: dict[str, PositiveInt]
    """Item embedding signals: name -> dimensions."""
    categoricals: dict[str, PositiveInt]
    """Item categorical signals: name -> cardinality; ids lie in [0, cardinality)."""
    user_categoricals: dict[str, PositiveInt]
    """User categorical signals, likewise."""
    user_embeddings: dict[str, PositiveInt] = {}
    """User embedding signals, likewise."""
    num_items: PositiveInt
    """Items; item_id lies in [0, num_items)."""
    num_users: NonNegativeInt
    """Users; user_id lies in [0, num_users). A dataset of items alone has none."""
    tasks: dict[str, TaskSpec] = {}
    """What is predicted, by the name of its label column; a dataset of items alone has none."""
    dense: tuple[str, ...]
    """Columns of an impression, of type float32."""
    sparse: dict[str, PositiveInt]
    """Columns of an impression, of type list<int64>: name -> number of ids; ids lie in [0, number)."""
    request_dense: tuple[str, ...] = ()
    """Columns that are the same for all impressions of a request, of type float32."""
    request_sparse: dict[str, PositiveInt] = {}
    """Columns that are the same for all impressions of a request, of type list<int64>, as `sparse`."""
    max_history: int
    """The longest history an event may carry."""
    train: tuple[date, date]
    """First and last date of training events, inclusive."""
    test: tuple[date, date]
    """First and last date of test events, inclusive."""
    origin: str
    """One sentence: where the data is from."""

    def content(self, entity: Entity) -> ContentSpec:
        """Give the content signals of the items or of the users."""
        if entity == "item":
            return ContentSpec("item_id", self.num_items, self.embeddings, self.categoricals)
        return ContentSpec("user_id", self.num_users, self.user_embeddings, self.user_categoricals)

    @model_validator(mode="after")
    def _check_splits(self) -> "DatasetSpec":
        if not self.train[0] <= self.train[1] < self.test[0] <= self.test[1]:
            raise ValueError(f"train {self.train} must end before test {self.test} begins")
        return self

    @property
    def all_dense(self) -> tuple[str, ...]:
        """The dense columns of impressions and of requests."""
        return (*self.dense, *self.request_dense)

    @property
    def all_sparse(self) -> dict[str, int]:
        """The sparse columns of impressions and of requests: name -> number of ids."""
        return {**self.sparse, **self.request_sparse}

    def ancestors(self, task: str) -> tuple[str, ...]:
        """Return the tasks that must have happened for a task to be asked, nearest first."""
        return ancestors(self.tasks, task)

    @model_validator(mode="after")
    def _check_tasks(self) -> "DatasetSpec":
        for name, task in self.tasks.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(f"tasks.{name}: must be of a-z, 0-9 and _, as a column is named after it")
            if task.given is not None and task.given not in self.tasks:
                raise ValueError(f"tasks.{name}.given: {task.given!r} is no task; tasks are {', '.join(self.tasks)}")
        for name in self.tasks:
            seen, parent = {name}, self.tasks[name].given
            while parent is not None:
                if parent in seen:
                    raise ValueError(f"tasks.{name}.given: the tasks are given each other in a circle")
                seen.add(parent)
                parent = self.tasks[parent].given
        return self

    @model_validator(mode="after")
    def _check_names(self) -> "DatasetSpec":
        tables = {
            "items": ["item_id", "text", *self.embeddings, *self.categoricals],
            "users": ["user_id", *self.user_embeddings, *self.user_categoricals],
            "events": [*EVENT_COLUMNS, *self.tasks, *self.all_dense, *self.all_sparse],
        }
        for table, names in tables.items():
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{table}: column {twice[0]!r} is named twice")
        return self


@dataclass(frozen=True)
class Dataset:
    """A dataset's directory and its spec."""

    path: Path
    spec: DatasetSpec

    @property
    def item_files(self) -> tuple[Path, ...]:
        """The files of the items table, in order."""
        return self._files("items")

    @property
    def user_files(self) -> tuple[Path, ...]:
        """The files of the users table, in order."""
        return self._files("users")

    def content_files(self, entity: Entity) -> tuple[Path, ...]:
        """The files of the table that has the content of items or of users, in order."""
        return self.item_files if entity == "item" else self.user_files

    def event_files(self, first: date, last: date) -> tuple[Path, ...]:
        """Give the event files of the dates from `first` to `last`, inclusive, in order of time.

        Raises:
            DataError: there is no event file in the range, or a folder's name is no date.
        """
        folders = sorted(self.path.glob("events/date=*"))
        chosen = [folder for folder in folders if first <= _date_of(folder) <= last]
        files = tuple(file for folder in chosen for file in sorted(folder.glob("*.parquet")))
        if not files:
            raise DataError(f"{self.path}/events: no files from {first} to {last}")
        return files

    def all_event_files(self) -> tuple[Path, ...]:
        """Give every event file, in order of time."""
        return self.event_files(date.min, date.max)

    def _files(self, table: str) -> tuple[Path, ...]:
        files = tuple(sorted((self.path / table).glob("*.parquet")))
        if not files:
            raise DataError(f"{self.path}/{table}: holds no Parquet file")
        return files


def _date_of(folder: Path) -> date:
    try:
        return date.fromisoformat(folder.name.removeprefix("date="))
    except ValueError:
        raise DataError(f"{folder}: the folder's name must be date=YYYY-MM-DD") from None


def read_dataset(path: Path) -> Dataset:
    """Open a dataset by its `dataset.json`.

    Raises:
        DataError: there is none. ConfigError: it breaks the DatasetSpec.
    """
    file = Path(path) / SPEC_FILE
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as a dataset's description: {error}") from error
    return Dataset(Path(path), parse(DatasetSpec, values, str(file)))


def write_spec(path: Path, spec: DatasetSpec) -> None:
    """Write the spec as `dataset.json` into the directory."""
    (Path(path) / SPEC_FILE).write_text(spec.model_dump_json(indent=1))


def item_schema(spec: DatasetSpec, embedding_type: pa.DataType | None = None) -> pa.Schema:
    """Give the items' schema; embeddings are stored as float16 unless told otherwise."""
    ids, *signals = _content_fields(spec.content("item"), embedding_type)
    return pa.schema([ids, pa.field("text", pa.string()), *signals])


def user_schema(spec: DatasetSpec, embedding_type: pa.DataType | None = None) -> pa.Schema:
    """Give the users' schema; embeddings are stored as float16 unless told otherwise."""
    return pa.schema(_content_fields(spec.content("user"), embedding_type))


def _content_fields(content: ContentSpec, embedding_type: pa.DataType | None) -> list[pa.Field]:
    stored = embedding_type or pa.float16()
    return [
        pa.field(content.id_column, pa.int64(), nullable=False),
        *(pa.field(name, pa.list_(stored, dim)) for name, dim in content.embeddings.items()),
        *(pa.field(name, pa.int32()) for name in content.categoricals),
    ]


def event_schema(spec: DatasetSpec) -> pa.Schema:
    """Give the events' schema: one row an impression."""
    return pa.schema(
        [
            pa.field("event_time", TIME, nullable=False),
            pa.field("user_id", pa.int64(), nullable=False),
            pa.field("item_id", pa.int64(), nullable=False),
            *(pa.field(name, pa.int8()) for name in spec.tasks),
            *(pa.field(name, pa.float32(), nullable=False) for name in spec.all_dense),
            *(pa.field(name, pa.list_(pa.int64())) for name in spec.all_sparse),
            pa.field("history_item_ids", pa.list_(pa.int64())),
            pa.field("history_times", pa.list_(TIME)),
        ]
    )


def check_items(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of the items table; see `check_content`."""
    check_content(table, spec.content("item"), where)


def check_users(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of the users table; see `check_content`."""
    check_content(table, spec.content("user"), where)


def check_content(table: pa.Table, content: ContentSpec, where: RowGroup) -> None:
    """Check rows of items or users: types, ids, finite embeddings, categorical ranges.

    Only the contract's columns that the table holds are checked, so that a reader of a few columns can use it.

    Raises:
        DataError: naming file, row group, column and rule.
    """
    check = _Checker(table, where)
    check.equals_row_number(content.id_column, content.rows)
    for name, dim in content.embeddings.items():
        check.embedding(name, dim)
    for name, cardinality in content.categoricals.items():
        check.ids(name, pa.int32(), cardinality)


def check_events(table: pa.Table, spec: DatasetSpec, where: RowGroup) -> None:
    """Check rows of the events table: types, nulls, labels, finite dense values, id ranges, history before event.

    Only the contract's columns that the table holds are checked, so that a reader of a few columns can use it.

    Raises:
        DataError: naming file, row group, column and rule.
    """
    check = _Checker(table, where)
    check.present("event_time", TIME)
    for name, number in (("user_id", spec.num_users), ("item_id", spec.num_items)):
        check.ids(name, pa.int64(), number, nullable=False)
    for name in spec.tasks:
        check.label(name)
    for name, task in spec.tasks.items():  # a parent may come after its child, and its type is known to be right now
        if task.given is not None:
            check.given(name, task.given)
    for name in spec.all_dense:
        check.finite(name)
    for name, number in spec.all_sparse.items():
        check.id_lists(name, number)
    check.id_lists("history_item_ids", spec.num_items)
    check.history(spec.max_history)


def require_columns(schema: pa.Schema, expected: pa.Schema, where: RowGroup | Path) -> None:
    """Check that every column of `expected` is there, with its type (embeddings as float16 or float32).

    Raises:
        DataError: naming the missing column, or the type it has and the one it should have.
    """
    for field in expected:
        if field.name not in schema.names:
            raise DataError(f"{where}: column {field.name!r} is missing; expected type {field.type}")
        _require_type(field.name, schema.field(field.name).type, field.type, where)


def _require_type(name: str, found: pa.DataType, expected: pa.DataType, where: RowGroup | Path) -> None:
    if pa.types.is_fixed_size_list(expected) and pa.types.is_fixed_size_list(found):
        same = found.list_size == expected.list_size and pa.types.is_floating(found.value_type)
    else:
        same = found == expected
    if not same:
        raise DataError(f"{where}: column {name!r} has type {found}, must be {expected}")


class _Checker:
    """The single rules, each over one column of one row group."""

    def __init__(self, table: pa.Table, where: RowGroup) -> None:
        self.table = table
        self.where = where

    def fail(self, column: str, rule: str) -> None:
        raise DataError(f"{self.where}: column {column!r}: {rule}")

    def present(self, name: str, expected: pa.DataType, nullable: bool = False) -> pa.ChunkedArray | None:
        """Give the column if the table holds it, after checking its type and nulls."""
        if name not in self.table.column_names:
            return None
        column = self.table[name]
        _require_type(name, column.type, expected, self.where)
        if not nullable and column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            self.fail(name, f"must not be null; is null in {column.null_count} rows, first in row {row}")
        return column

    def ids(self, name: str, expected: pa.DataType, number: int, nullable: bool = True) -> None:
        column = self.present(name, expected, nullable)
        if column is not None:
            self._in_range(name, column, number)

    def id_lists(self, name: str, number: int) -> None:
        column = self.present(name, pa.list_(pa.int64()))
        if column is None:
            return
        values = pc.list_flatten(column)
        if values.null_count:
            self.fail(name, "must hold no null inside a list")
        self._in_range(name, values, number)

    def _in_range(self, name: str, values: pa.ChunkedArray, number: int) -> None:
        bounds = pc.min_max(values)
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if low is not None and (low < 0 or high >= number):
            self.fail(name, f"id {low if low < 0 else high} is outside the table [0, {number})")

    def equals_row_number(self, name: str, number: int) -> None:
        column = self.present(name, pa.int64())
        if column is None:
            return
        self._in_range(name, column, number)
        expected = np.arange(self.where.start, self.where.start + len(column))
        wrong = np.flatnonzero(column.to_numpy() != expected)
        if len(wrong):
            row = int(wrong[0])
            self.fail(name, f"must equal the row number; row {expected[row]} has {column[row].as_py()}")

    def label(self, name: str) -> None:
        column = self.present(name, pa.int8(), nullable=True)
        if column is None:
            return
        bounds = pc.min_max(column)
        for value in (bounds["min"].as_py(), bounds["max"].as_py()):
            if value not in (0, 1, None):
                self.fail(name, f"label {value} is not 0 or 1")

    def given(self, name: str, parent: str) -> None:
        """Check that a label is not 1 where that of the task's parent is 0."""
        if {name, parent} <= set(self.table.column_names):
            is_wrong = pc.and_(pc.equal(self.table[name], 1), pc.equal(self.table[parent], 0))
            wrong = np.flatnonzero(pc.fill_null(is_wrong, False).to_numpy())
            if len(wrong):
                rule = f"must not be 1 where {parent!r} is 0, which it is given"
                self.fail(name, f"{rule}; is in {len(wrong)} rows, first in row {wrong[0]}")

    def finite(self, name: str) -> None:
        column = self.present(name, pa.float32())
        if column is not None:
            self._all_finite(name, column.to_numpy())

    def embedding(self, name: str, dim: int) -> None:
        column = self.present(name, pa.list_(pa.float16(), dim), nullable=True)
        if column is not None:
            # flatten() leaves the nulls' own slots out, whatever bytes they hold.
            for chunk in column.chunks:
                self._all_finite(name, chunk.flatten().to_numpy(zero_copy_only=False))

    def _all_finite(self, name: str, values: npt.NDArray[np.floating]) -> None:
        # numpy widens halves one by one; their exponent says it ten times faster.
        halves = values.dtype == np.float16
        finite = (values.view(np.uint16) & 0x7C00) != 0x7C00 if halves else np.isfinite(values)
        if not finite.all():
            self.fail(name, f"must be finite; holds {values[~finite][0]}")

    def history(self, longest: int) -> None:
        times = self.present("history_times", pa.list_(TIME))
        if times is None or "history_item_ids" not in self.table.column_names:
            return
        lengths = pc.list_value_length(times).to_numpy()
        if not np.array_equal(lengths, pc.list_value_length(self.table["history_item_ids"]).to_numpy()):
            self.fail("history_times", "must have as many entries as history_item_ids in every row")
        if len(lengths) and lengths.max() > longest:
            self.fail("history_times", f"has {lengths.max()} entries, more than max_history={longest}")
        flat = pc.list_flatten(times).cast(pa.int64()).to_numpy()
        ends = np.cumsum(lengths)
        is_older = flat[1:] < flat[:-1]  # than the entry before it
        is_older[ends[(ends > 0) & (ends < len(flat))] - 1] = False  # which was another row's
        if is_older.any():
            self.fail("history_times", "must be oldest first")
        if "event_time" in self.table.column_names:
            event = self.table["event_time"].cast(pa.int64()).to_numpy()
            held = np.flatnonzero(lengths)
            late = held[flat[ends[held] - 1] >= event[held]]  # the newest entry stands for all of its row
            if len(late):
                row = int(late[0])
                entries = flat[ends[row] - lengths[row] : ends[row]]
                at = datetime.fromtimestamp(int(entries[entries >= event[row]][0]) / 1e6, tz=None)
                self.fail("history_times", f"must lie strictly before event_time; row {row} has an entry at {at}")
