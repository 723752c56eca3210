"""Held-out predictions of one arm, sorted on disk, and the check that two arms predicted the same rows.

Ranks write rows in the order of their lanes, and metrics need them by row, by score and by user. DuckDB sorts them
within `MEMORY`, whatever their number. Floats are summed by `ranker.statistics`, in a fixed order, not by DuckDB.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sidestack.infra.errors import DataError
from sidestack.infra.parquet import RowGroup, read_row_group, row_groups
from sidestack.infra.sql import quoted
from sidestack.ranker.config import Dates
from sidestack.ranker.metric_registry import Order
from sidestack.ranker.statistics import Rows

Integers = NDArray[np.int64]

FOLDER = "predictions"
"""The folder of the predictions in a ranker's output."""
IDENTITY = ("row", "user_id", "item_id")
MEMORY = "64MiB"
BATCH_ROWS = 1 << 16
_ROWS, _UNSORTED = "rows_of_a_group", "unsorted"


@contextmanager
def sorting(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database for `sorted_predictions`, in a temporary directory within `folder` that is removed at the end."""
    with TemporaryDirectory(dir=folder, prefix="sorted-") as scratch:
        # One thread keeps a table's rows in the order in which they were written, and uses the least memory.
        config: dict[str, Any] = {"threads": 1, "memory_limit": MEMORY, "temp_directory": f"{scratch}/spilled"}
        with duckdb.connect(f"{scratch}/rows.duckdb", config=config) as database:
            database.execute("SET enable_progress_bar = false")  # it would print to stdout
            yield database


@contextmanager
def sorted_predictions(
    path: Path,
    tasks: Sequence[str],
    database: duckdb.DuckDBPyConnection,
    labels: Mapping[str, Dates] | None = None,
) -> Iterator["Predictions"]:
    """Read `predictions/*.parquet` of a ranker's output, from any number of ranks, and sort it by `row`.

    Args:
        path: the ranker's directory. Each task has a label column of its name there, and a column `p_<task>`.
        tasks: the tasks. database: from `sorting`; the rows are dropped from it at the end.
        labels: by task, the first and last date whose labels are judged; a task that is not named has none. None: all.

    Raises:
        DataError: no file, a missing column, a null, a label outside {0, 1}, a probability outside [0, 1],
            a row that was predicted twice, or no room to sort.
    """
    files = sorted(Path(path).glob(f"{FOLDER}/*.parquet"))
    if not files:
        raise DataError(f"{path}/predictions: holds no Parquet file")
    groups = row_groups(files)
    if not sum(group.rows for group in groups):
        raise DataError(f"{path}/predictions: holds no row")
    predictions = Predictions(Path(path), tuple(tasks), database, labels)
    predictions.load(groups)
    yield predictions
    predictions.drop()  # not after an error: a stream may still hold the table, and the whole database is removed then


def _checked(group: RowGroup, tasks: Sequence[str], further: Sequence[str]) -> pa.Table:
    """Read one row group, and check it against the contract."""
    scores = [f"p_{task}" for task in tasks]
    table = read_row_group(group, [*IDENTITY, *tasks, *scores, *further])
    for name in (*IDENTITY, *scores):
        if table[name].null_count:
            raise DataError(f"{group}: column {name!r} has {table[name].null_count} nulls; none may be")
    for task, score in zip(tasks, scores, strict=True):
        labels, chances = table[task], table[score]
        known = pc.is_in(labels, pa.array([0, 1, None], labels.type))
        _require_good(labels, known, task, group, "0, 1 or null")
        inside = pc.and_(pc.greater_equal(chances, 0.0), pc.less_equal(chances, 1.0))
        _require_good(chances, inside, score, group, "a probability in [0, 1]")
    return table


def _require_good(values: pa.ChunkedArray, good: pa.ChunkedArray, name: str, group: RowGroup, rule: str) -> None:
    bad = values.filter(pc.invert(good))
    if len(bad):
        raise DataError(f"{group}: column {name!r} holds {bad[0].as_py()!r}; must be {rule}")


class Predictions:
    """The held-out rows of one arm, in a table of the database; see `sorted_predictions`."""

    def __init__(
        self,
        path: Path,
        tasks: tuple[str, ...],
        database: duckdb.DuckDBPyConnection,
        labels: Mapping[str, Dates] | None = None,
    ) -> None:
        self.path = path
        self.tasks = tasks
        self._database = database
        self._labels = labels
        self._table = quoted(str(path))
        self._users: dict[str, Integers] = {}

    def load(self, groups: Sequence[RowGroup]) -> None:
        """Sort the row groups' rows into the table; see `sorted_predictions`."""
        labels = (f"CAST({self._label(task)} AS TINYINT) AS {quoted(task)}" for task in self.tasks)
        columns = [*map(quoted, IDENTITY), *labels, *(quoted(f"p_{task}") for task in self.tasks)]
        # Not read by DuckDB, which does not verify page checksums.
        further = () if self._labels is None else ("event_time",)
        with self._naming_errors():
            for number, group in enumerate(groups):
                self._database.register(_ROWS, _checked(group, self.tasks, further))
                into = f"INSERT INTO {_UNSORTED}" if number else f"CREATE TABLE {_UNSORTED} AS"
                self._database.execute(f"{into} SELECT {', '.join(columns)} FROM {_ROWS}")
                self._database.unregister(_ROWS)
            query = f"SELECT * FROM {_UNSORTED} ORDER BY {quoted('row')}"
            self._database.execute(f"CREATE TABLE {self._table} AS {query}; DROP TABLE {_UNSORTED}")
        last_N = np.zeros(0, np.int64)
        for batch in self._batches(f"SELECT {quoted('row')} FROM {self._table}"):
            rows_N = np.concatenate([last_N, batch["row"].to_numpy()])
            twice_N = rows_N[1:][np.diff(rows_N) == 0]
            if len(twice_N):
                raise DataError(f"{self.path}/predictions: row {twice_N[0]} was predicted more than once")
            last_N = rows_N[-1:]

    def _label(self, task: str) -> str:
        """Return the SQL expression of a task's label, null on dates that are not judged."""
        if self._labels is None:
            return quoted(task)
        if task not in self._labels:
            return "NULL"
        first, last = self._labels[task]
        return f"CASE WHEN CAST(event_time AS DATE) BETWEEN DATE '{first}' AND DATE '{last}' THEN {quoted(task)} END"

    def drop(self) -> None:
        """Remove the table."""
        self._database.execute(f"DROP TABLE {self._table}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._numbers(f"SELECT count(*) FROM {self._table}")[0]

    def count_users(self) -> int:
        """Return the number of distinct users."""
        return self._numbers(f"SELECT count(DISTINCT user_id) FROM {self._table}")[0]

    def count_labels(self, task: str) -> tuple[int, int]:
        """Return how many rows are judged on a task, and how many of these are positive."""
        label = quoted(task)
        num, positives = self._numbers(f"SELECT count({label}), coalesce(sum({label}), 0) FROM {self._table}")
        return num, positives

    def users(self, task: str) -> Integers:
        """Return the ids of the users who have a judged row, ascending, [U]."""
        if task not in self._users:
            judged = f"{self._table} WHERE {quoted(task)} IS NOT NULL"
            batches = self._batches(f"SELECT DISTINCT user_id FROM {judged} ORDER BY user_id")
            parts = [batch["user_id"].to_numpy() for batch in batches]
            self._users[task] = np.concatenate([np.zeros(0, np.int64), *parts])
        return self._users[task]

    def judged(self, task: str, order: Order) -> Iterator[Rows]:
        """Yield the rows that are judged on a task, in the given order."""
        label, score = quoted(task), quoted(f"p_{task}")
        by = {"row": "", "score": f" ORDER BY {score}, {quoted('row')}", "user": f" ORDER BY user_id, {score}"}
        users_U = self.users(task)
        query = f"SELECT user_id, item_id, {label}, {score} FROM {self._table} WHERE {label} IS NOT NULL{by[order]}"
        for batch in self._batches(query):
            user_M, item_M, label_M, score_M = (column.to_numpy(zero_copy_only=False) for column in batch.columns)
            ids = {"user": user_M, "item": item_M}
            yield Rows(np.searchsorted(users_U, user_M), ids, label_M, score_M.astype(np.float64))

    def first_difference(self, other: "Predictions") -> dict[str, tuple[int | None, int | None]]:
        """Return the ids and labels of the first row that differs from the other's, column -> (own, other's).

        Empty if all rows have the same ids and labels. Both must have the same number of rows, in one database.
        """
        names = [*IDENTITY, *self.tasks]
        pairs = ", ".join(f"a.{quoted(name)}, b.{quoted(name)}" for name in names)
        differ = " OR ".join(f"a.{quoted(name)} IS DISTINCT FROM b.{quoted(name)}" for name in names)
        both = f"{self._table} AS a POSITIONAL JOIN {other._table} AS b"
        with self._naming_errors():
            found = self._database.sql(f"SELECT {pairs} FROM {both} WHERE {differ} LIMIT 1").fetchall()
        return {name: (row[2 * at], row[2 * at + 1]) for row in found for at, name in enumerate(names)}

    def _numbers(self, query: str) -> tuple[int, ...]:
        with self._naming_errors():
            (found,) = self._database.sql(query).fetchall()
        return tuple(int(number) for number in found)

    def _batches(self, query: str) -> Iterator[pa.RecordBatch]:
        with self._naming_errors():
            yield from self._database.sql(query).to_arrow_reader(BATCH_ROWS)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except duckdb.Error as error:
            raise DataError(f"{self.path}/predictions: cannot be sorted: {error}") from error


def require_same_rows(arm: Predictions, reference: Predictions) -> None:
    """Check that an arm predicted the reference's rows, for the same users, items and labels.

    Raises:
        DataError: names both directories, the first row that differs, and its differing columns.
    """
    both = f"{arm.path} and {reference.path} cannot be paired"
    if len(arm) != len(reference):
        raise DataError(f"{both}: {len(arm):,} predicted rows against {len(reference):,}")
    found = arm.first_difference(reference)
    for name, (own, expected) in found.items():
        if own != expected:
            raise DataError(f"{both}: row {found['row'][1]} has {name} {_shown(own)} against {_shown(expected)}")


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)
