"""Spark as the engine of a log's rows, for a log too large for one machine; needs requirements/spark.txt and Java.

Where Spark runs, and with how much memory, is set in Spark's own configuration. Its tables are Parquet files in a
temporary directory. All executors must be able to access this directory and the run's folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from sidestack.infra.errors import ConfigError
from sidestack.infra.parquet import open_parquet
from sidestack.pipelines.prepare.log.in_spark import asof_by_window, in_spark

BATCH_ROWS = 1 << 15
SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.timestampType": "TIMESTAMP_NTZ",
    "spark.sql.ansi.enabled": "true",
}
"""Settings of the session under which a query has the same meaning as in DuckDB."""
HASHED = (
    "CREATE OR REPLACE TEMPORARY FUNCTION hashed(words STRING) RETURNS BIGINT"
    " RETURN CAST(conv(substr(md5(words), 1, 15), 16, 10) AS BIGINT)"
)


@contextmanager
def open_spark(folder: Path) -> Iterator["SparkEngine"]:
    """Open a new session with its tables in a temporary directory within `folder`.

    Raises:
        ConfigError: Spark does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".log-", suffix=".tmp") as scratch:
        yield SparkEngine(_session(), Path(scratch))


def _session() -> SparkSession:
    try:
        session: SparkSession = SparkSession.builder.appName("sidestack prepare").getOrCreate().newSession()
    except RuntimeError as error:  # raised by PySpark if the Java process does not start
        raise ConfigError(
            "prepare.source.engine: spark does not start; it needs Java 17 or newer (JAVA_HOME, or `java` on the path):"
            f" {str(error).splitlines()[0]}"
        ) from error
    for name, value in SETTINGS.items():
        session.conf.set(name, value)
    session.sql(HASHED)
    return session


class SparkEngine:
    """A Spark session as an `Engine`; its tables are Parquet files in a folder."""

    def __init__(self, session: SparkSession, scratch: Path) -> None:
        self._session = session
        self._scratch = scratch
        self._numbers = count()

    def files(self, name: str, files: Sequence[Path]) -> None:
        """Create view `name` of Parquet files, with `filename`."""
        reader = self._session.read.option("mergeSchema", "true").option("recursiveFileLookup", "true")
        rows = reader.parquet(*(_uri(file) for file in files))
        rows.selectExpr("*", "_metadata.file_path AS filename").createOrReplaceTempView(name)

    def table(self, name: str, query: str) -> None:
        """Create table `name` with a query's rows; written to files, so that no later query recomputes them."""
        rows = self._session.sql(in_spark(query))
        place = self._written(rows)
        self._session.read.schema(rows.schema).parquet(_uri(place)).createOrReplaceTempView(name)

    def row(self, query: str) -> tuple[Any, ...]:
        """Return the first row of a query."""
        return tuple(self._session.sql(in_spark(query)).collect()[0])

    def batches(self, query: str) -> pa.RecordBatchReader:
        """Return a query's rows, in order: Spark writes them to files whose names are in that order."""
        files = sorted(self._written(self._session.sql(in_spark(query))).glob("part-*.parquet"))
        schema = _plain(pq.read_schema(files[0]))
        return pa.RecordBatchReader.from_batches(schema, _batches(files, schema))

    def asof(
        self, asked: str, known: str, by: Sequence[str], at: str, values: Mapping[str, str], *, is_later: bool = False
    ) -> str:
        """Return a window over the rows of both queries; see `Engine.asof`."""
        return asof_by_window(asked, known, by, at, values, is_later=is_later)

    def _written(self, rows: DataFrame) -> Path:
        place = self._scratch / f"{next(self._numbers):04d}"
        rows.write.parquet(_uri(place))
        return place


def _uri(path: Path) -> str:
    """Return a path as a `file:` URI, independent of the cluster's default filesystem."""
    return f"file://{path.resolve()}"


def _plain(schema: pa.Schema) -> pa.Schema:
    """Return a schema without Spark's additions: its metadata, and non-nullable columns."""
    return pa.schema([field.with_nullable(True).remove_metadata() for field in schema])


def _batches(files: Sequence[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in files:
        with open_parquet(file) as opened:
            for batch in opened.iter_batches(BATCH_ROWS):
                yield pa.RecordBatch.from_arrays(batch.columns, schema=schema)
