"""Query engines for a log's rows: DuckDB on one machine, or Spark on many; the rows are the same.

Queries are written once, in the part of DuckDB's dialect that sqlglot translates. ASOF joins depend on the engine:
DuckDB's own is fast; for Spark it is a window over the rows of both sides.
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
    """Interface for queries over Parquet files and tables made from them.

    In addition to what both engines have, `hashed(words)` is a hash of a text in [0, 2^60).
    """

    def files(self, name: str, files: Sequence[Path]) -> None:
        """Create view `name` of Parquet files, with columns matched by name; `filename` is a row's file."""

    def table(self, name: str, query: str) -> None:
        """Create or replace table `name` with a query's rows."""

    def row(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query."""

    def batches(self, query: str) -> pa.RecordBatchReader:
        """Return a query's rows, in order, a batch in memory at a time."""

    def asof(
        self, asked: str, known: str, by: Sequence[str], at: str, values: Mapping[str, str], *, is_later: bool = False
    ) -> str:
        """Return the query of an ASOF join: it adds columns of one matching row, null if there is none.

        Args:
            asked: left side: query whose rows are kept. known: right side: query with `event_time`, without nulls in
                `by`.
            by: columns that are equal on both sides. at: time, an expression over columns of `asked`.
            values: new name -> column of `known`.
            is_later: match the first row at `at` or later, instead of the last row before `at`.
        """


def require_engine(name: EngineName) -> None:
    """Check that an engine's packages are installed.

    Raises:
        ConfigError: a package is not installed.
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
    """Open an engine with its tables in a temporary directory within `folder`, which is removed on exit.

    Raises:
        ConfigError: Spark is not installed or does not start.
    """
    require_engine(name)
    if name == "spark":
        from sidestack.pipelines.prepare.log.on_spark import open_spark

        with open_spark(folder) as spark:
            yield spark
    else:
        with database(folder) as connection:
            yield DuckDBEngine(connection)
