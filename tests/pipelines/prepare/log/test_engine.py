"""The Spark engine without Spark: the error for the missing package, the digest, and the translation of queries."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.config import digest, parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.log import opened as opened_log
from sidestack.pipelines.prepare.log.in_spark import asof_by_window, in_spark
from sidestack.pipelines.prepare.log.on_duckdb import DuckDBEngine, database
from tests.pipelines.prepare.log.raw import log_config, write_log
from tests.pipelines.prepare.running import leftovers, run_prepare


def test_missing_spark_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sidestack.pipelines.prepare.log.on_spark", raising=False)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    write_log(tmp_path, days=2)
    with pytest.raises(ConfigError, match="engine: spark: package 'pyspark.*' is not installed; `pip install -r req"):
        run_prepare(ALONE, log_config(tmp_path, engine="spark"), tmp_path / "runs/out")
    assert leftovers(tmp_path) == [] and not (tmp_path / "runs/store").exists()


def test_engine_does_not_change_the_digest(tmp_path: Path) -> None:
    one, other = (parse(PrepareConfig, log_config(tmp_path, engine=name), "test") for name in ("duckdb", "spark"))
    assert digest(one) == digest(other)


class Translating(DuckDBEngine):
    """A DuckDB engine that translates each query to Spark's SQL before it runs it."""

    def table(self, name: str, query: str) -> None:
        _translate(query)
        super().table(name, query)

    def row(self, query: str) -> tuple[Any, ...]:
        _translate(query)
        return super().row(query)

    def batches(self, query: str) -> pa.RecordBatchReader:
        _translate(query)
        return super().batches(query)

    def asof(self, *arguments: Any, is_later: bool = False) -> str:
        _translate(asof_by_window(*arguments, is_later=is_later))
        return super().asof(*arguments, is_later=is_later)


def _translate(query: str) -> None:
    if "ASOF" not in query:
        assert in_spark(query)


def test_every_query_can_be_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(name: str, folder: Path) -> Iterator[Translating]:
        with database(folder) as connection:
            yield Translating(connection)

    monkeypatch.setattr(opened_log, "open_engine", opened)
    write_log(tmp_path, days=6)
    run_prepare(ALONE, log_config(tmp_path, negatives=1), tmp_path / "runs/out")
