"""What runs the queries of a log's rows: DuckDB on one machine, or Spark on many; the rows are the same.

Queries are written once, in that part of DuckDB's dialect that sqlglot translates. An ASOF join is asked of the
engine: DuckDB's own is fast, and for Spark it is a window over the rows of both sides.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from sidestack.infra.errors import ConfigError
from sidestack.pipelines.prepare.log.config import EngineName
from sidestack.pipelines.prepare.log.on_duckdb import DuckDBEngine, database


class Engine(Protocol):
    """Runs queries over Parquet files and over tables made of them.

    Beside what both have, `hashed(words)` is a number, from 0 on and below 2^60, that follows from a text.
    """

    def files(self, name: str, files: Sequence[Path]) -> None:
        """Make view `name` of Parquet files, whose columns are matched by name; `filename` says where a row lies."""

    def table(self, name: str, query: str) -> None:
        """Make table `name` of a query's rows, in place of an earlier one."""

    def row(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query."""

    def batches(self, query: str) -> pa.RecordBatchReader:
        """Return a query's rows, in its order, a batch in memory at a time."""

    def asof(
        self, asked: str, known: str, by: Sequence[str], at: str, values: Mapping[str, str], *, is_later: bool = False
    ) -> str:
        """Return the query that adds to each row of one query columns of one row of another, null where there is none.

        Args:
            asked: query whose rows are kept. known: query with `event_time`, and no null in `by`.
            by: columns that are equal in both. at: time, an expression over columns of `asked`.
            values: column of `known` by the name it gets.
            is_later: take the first row at `at` or later, in place of the last row before `at`.
        """


def require_engine(name: EngineName) -> None:
    """Check that an engine's packages are there.

    Raises:
        ConfigError: one is not installed.
    """
    if name == "spark":
        try:
            import sidestack.pipelines.prepare.log.on_spark  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"prepare.source.engine: spark: package {error.name!r} is not installed;"
                " `pip install -r requirements/spark.txt` installs what it needs, or take engine: duckdb"
            ) from error


@contextmanager
def open_engine(name: EngineName, folder: Path) -> Iterator[Engine]:
    """Open an engine whose tables lie in a temporary directory within `folder`, which is removed at the end.

    Raises:
        ConfigError: it is Spark, and that is not installed or does not start.
    """
    require_engine(name)
    if name == "spark":
        from sidestack.pipelines.prepare.log.on_spark import open_spark

        with open_spark(folder) as spark:
            yield spark
    else:
        with database(folder) as connection:
            yield DuckDBEngine(connection)
