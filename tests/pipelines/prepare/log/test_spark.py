"""A log has the same bytes on Spark as on DuckDB."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE
from tests.pipelines.prepare.log.raw import (
    EVENT_SCHEMA,
    catalogue,
    log_config,
    raw_events,
    raw_orders,
    write,
    write_days,
)
from tests.pipelines.prepare.running import leftovers, made_of, run_prepare

lacking = [name for name in ("pyspark", "sqlglot") if importlib.util.find_spec(name) is None]
lacking += [] if shutil.which("java") or "JAVA_HOME" in os.environ else ["Java"]
pytestmark = [pytest.mark.spark, pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")]
SUBMIT = (
    "--master local[2] --driver-memory 1g --conf spark.ui.enabled=false --conf spark.sql.shuffle.partitions=1"
    " --conf spark.sql.adaptive.enabled=false --driver-java-options -XX:TieredStopAtLevel=1"
)


@pytest.fixture(scope="module", autouse=True)
def _spark() -> Iterator[None]:
    """Start a minimal Spark session, which the engine then uses."""
    from pyspark.sql import SparkSession

    before = os.environ.get("PYSPARK_SUBMIT_ARGS")
    os.environ["PYSPARK_SUBMIT_ARGS"] = f"{SUBMIT} pyspark-shell"
    session = SparkSession.builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    yield
    session.stop()
    os.environ.pop("PYSPARK_SUBMIT_ARGS")
    if before is not None:
        os.environ["PYSPARK_SUBMIT_ARGS"] = before


def on_both(folder: Path, *settings: dict[str, Any]) -> None:
    """Prepare a log with each of the settings in turn on both engines, and compare all files."""
    made = {}
    for engine in ("duckdb", "spark"):
        for number, values in enumerate(settings):
            run_prepare(ALONE, log_config(folder, engine=engine, **values), folder / engine / f"run-{number}")
        made[engine] = {
            name: found
            for number in range(len(settings))
            for name, found in made_of(folder / engine / f"run-{number}").items()
        }
    assert made["duckdb"].keys() == made["spark"].keys()
    differing = [name for name, found in made["duckdb"].items() if made["spark"][name] != found]
    assert differing == []
    assert leftovers(folder / "spark") == []


def test_growing_log_is_the_same_on_both_engines(tmp_path: Path) -> None:
    events = raw_events(8)
    for number, row in enumerate(events):
        row["ts"] = row["ts"].replace(microsecond=number % 3 * 1000 + number % 2)
    write_days(tmp_path / "events", [*events, *events[:9]])
    write(tmp_path / "items.parquet", catalogue(7))
    orders = [row | {"eid": f"e{number * 3}"} for number, row in enumerate(raw_orders(events))]
    write(tmp_path / "orders.parquet", orders)
    source = log_config(tmp_path)["source"]
    pairs = source["labels"]["orders"]
    by_event = {"path": pairs["path"], "time": "at", "event_id": "eid"}
    settings = {
        "events": source["events"] | {"dense": [], "quantiles": {"price": 3}},
        "labels": {"orders": pairs, "returns": by_event},
        "tasks": source["tasks"] | {"return": {"table": "returns", "within_days": 3}},
        "delay_minutes": 90,
    }
    on_both(tmp_path, *(settings | {"as_of": day} for day in ("2024-03-07", "2024-03-09")))


def test_log_of_sessions_with_drawn_negatives_is_the_same_on_both_engines(tmp_path: Path) -> None:
    rows = raw_events(3, items=30)
    events = [row | {"action": "click", "session": f"s{number // 5}-{row['uid']}"} for number, row in enumerate(rows)]
    schema = pa.schema([*(field for field in EVENT_SCHEMA if field.name != "ts"), pa.field("ts", pa.timestamp("us")),
                        pa.field("session", pa.string())])  # fmt: skip
    write(tmp_path / "events/all.parquet", events, schema)
    columns = log_config(tmp_path)["source"]["events"] | {"event_id": None, "request": "session"}
    on_both(tmp_path, {"events": columns, "items": None, "labels": {}, "tasks": {"click": {}}, "negatives": 2})
