"""The benchmark of a growing log: its counts equal those of the files on disk."""

import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from sidestack.benchmarks.growth import (
    FIRST_DAY,
    GrowingLog,
    Sizes,
    bytes_by_table,
    day_added,
    goals,
    layout_rows,
    main,
)
from sidestack.benchmarks.record import Row
from sidestack.infra.snapshot import read_dataset

SIZES = Sizes(days=(3,), impressions=110, items=60)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> GrowingLog:
    return GrowingLog(tmp_path_factory.mktemp("growth"), SIZES)


@pytest.fixture(scope="module")
def rows(log: GrowingLog) -> list[Row]:
    return day_added(log, 3)


def test_added_day_writes_its_partitions_and_the_labels_that_mature(log: GrowingLog, rows: list[Row]) -> None:
    found = {(row["stage"], row["what"]): row for row in rows}
    day = FIRST_DAY + timedelta(days=3)
    own = bytes_by_table(read_dataset(log.outputs["materialize"]), day)
    written = found["materialize", "partitions"]
    assert written["files"] == 2 * 2
    assert written["bytes"] == sum(number for table, number in own.items() if table.startswith("sids/"))
    written = found["prepare", "partitions"]
    assert written["files"] == 2 * (3 + 1)  # the labels of two days before have matured
    assert written["bytes"] > sum(own[table] for table in ("requests", "events", "labels"))
    assert written["of_a_day"] == written["bytes"] / sum(own.values())
    assert found["prepare", "lists"]["files"] == 3  # of requests, events and labels; that of items is unchanged
    assert found["materialize", "lists"]["files"] == 2
    assert all(found[stage, "snapshot"]["bytes"] > 0 for stage in ("prepare", "materialize"))
    assert all(row["seconds"] > 0 for row in rows if row["what"] != "lists")


def test_both_layouts_have_the_same_impressions(log: GrowingLog, rows: list[Row], tmp_path: Path) -> None:
    dataset = read_dataset(log.outputs["materialize"])
    layouts = layout_rows("log", dataset, tmp_path / "joined")
    assert {row["impressions"] for row in layouts} == {4 * 110}
    joined = sum(file.stat().st_size for file in (tmp_path / "joined").rglob("*") if file.is_file())
    by_table = {row["part"]: row["bytes_an_impression"] for row in layouts}
    assert by_table.pop("all columns") == joined / 440
    together = by_table.pop("together")
    assert sum(by_table.values()) == pytest.approx(together)
    assert set(by_table) == {"requests", "events", "labels", "SIDs 'sid' of events", "SIDs 'sid' of requests"}


def test_goals_compare_the_longest_log_with_the_shortest() -> None:
    found: list[Row] = [
        {"days": days, "stage": stage, "what": what, "bytes": size, "seconds": days / 100}
        for days in (10, 100)
        for stage, listed in (("prepare", 1100), ("materialize", 100 * days))
        for what, size in (("partitions", 1000), ("lists", days), ("snapshot", listed))
    ]
    assert [row["met"] for row in goals(found)] == ["yes", "yes", "no", "yes", "no", "no"]


@pytest.mark.slow
def test_quick_run_writes_both_tables(
    log: GrowingLog, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = log.outputs["materialize"]
    monkeypatch.setattr(sys, "argv", ["growth", "--quick", "--dataset", str(given), "--out", str(tmp_path)])
    main()
    written = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert {row["table"] for row in written if "goal" not in row} == {"A day added", "Bytes an impression"}
    assert {row["log"] for row in written if "log" in row} == {"synthetic", given.name}
    assert "| 6 | materialize | partitions | 4 |" in (tmp_path / "growth.md").read_text()
