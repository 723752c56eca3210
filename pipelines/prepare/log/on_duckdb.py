"""DuckDB as the engine of a log's rows: it streams and spills to disk, in bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa

from sidestack.infra.sql import file_list, matching

BATCH_ROWS = 1 << 15
MEMORY_SHARE = "50%"
"""Share of the machine's memory that a rank's DuckDB uses before it spills to disk."""


@contextmanager
def database(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database that spills to a temporary directory within `folder`, which is removed on exit."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".log-", suffix=".tmp") as scratch:
        config: dict[str, Any] = {"memory_limit": MEMORY_SHARE, "temp_directory": f"{scratch}/spilled"}
        with duckdb.connect(f"{scratch}/log.duckdb", config=config) as connection:
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET preserve_insertion_order = true")
            yield connection


class DuckDBEngine:
    """An open database as an `Engine`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        connection.execute(
            "CREATE OR REPLACE TEMP MACRO hashed(words) AS CAST('0x' || substr(md5(words), 1, 15) AS BIGINT)"
        )

    def files(self, name: str, files: Sequence[Path]) -> None:
        """Create view `name` of Parquet files, with `filename`."""
        rows = f"read_parquet({file_list(files)}, union_by_name = true, filename = true)"
        self._connection.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS SELECT * FROM {rows}")

    def table(self, name: str, query: str) -> None:
        """Create table `name` with a query's rows."""
        self._connection.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")

    def row(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query."""
        found: tuple[Any, ...] = self._connection.execute(query).fetchall()[0]
        return found

    def batches(self, query: str) -> pa.RecordBatchReader:
        """Return a query's rows, in order."""
        return self._connection.sql(query).to_arrow_reader(BATCH_ROWS)

    def asof(
        self, asked: str, known: str, by: Sequence[str], at: str, values: Mapping[str, str], *, is_later: bool = False
    ) -> str:
        """Return an ASOF join; see `Engine.asof`."""
        taken = ", ".join(f"known.{column} AS {name}" for name, column in values.items())
        return (
            f"SELECT asked.*, {taken} FROM ({asked}) AS asked ASOF LEFT JOIN ({known}) AS known"
            f" ON {matching('asked', 'known', by)} AND {at} {'<=' if is_later else '>'} known.event_time"
        )
