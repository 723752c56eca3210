"""Retention: old rows are not read, are deleted, and are not made again, but later rows still count them."""

import shutil
import sys
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import CommitError, ConfigError, DataError
from sidestack.infra.manifest import MANIFEST
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.privacy import expire as command
from sidestack.pipelines.privacy.expire import expire, retained_since
from tests.datasets import content
from tests.pipelines.prepare.log.raw import (
    FIRST,
    Row,
    catalogue,
    log_config,
    raw_events,
    raw_orders,
    write,
    write_days,
    write_log,
)
from tests.pipelines.prepare.log.test_rows import assert_same, expected_rows, found_rows
from tests.pipelines.prepare.running import digests, run_prepare

DAYS = 7
"""Days of retention."""


def prepare(folder: Path, day: int, out: str = "", **privacy: Any) -> Path:
    """Prepare the log of a folder as of the n-th day of March."""
    path = folder / "runs" / (out or f"as-of-{day}")
    run_prepare(ALONE, log_config(folder, as_of=date(2024, 3, day), privacy=privacy), path)
    return path


def store_of(folder: Path) -> Store:
    return Store(folder / "runs/store")


def since(day: int) -> date:
    return date(2024, 3, day) - timedelta(days=DAYS)


def dates(out: Path) -> list[date]:
    return read_dataset(out).dates()


def files(folder: Path) -> dict[str, int]:
    """Return the time of change of every file in the store."""
    store = store_of(folder).path
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def event_days(folder: Path) -> set[date]:
    """Return the dates of all typed events in the store."""
    found = [pq.read_table(file)["event_time"] for file in (folder / "runs/store/raw/events").rglob("*.parquet")]
    return {at.date() for column in found for at in column.to_pylist()}


def expected_without_retention(events: Sequence[Row], first: date, end: int) -> dict[Any, list[Row]]:
    rows = expected_rows(list(events), end=datetime(2024, 3, end))
    return {place: found for place, found in rows.items() if first <= place[2].date() < date(2024, 3, end)}


def test_rows_older_than_the_retention_are_left_out_of_the_first_snapshot(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, days=12)
    out = prepare(tmp_path, 13, retention_days=DAYS)
    kept = {since(13) + timedelta(days=n) for n in range(DAYS)}
    assert set(dates(out)) == event_days(tmp_path) == kept and retained_since(out) == since(13)
    assert "events: 200 rows are older than the retention and are left out" in capfd.readouterr().err
    whole = log_config(tmp_path, privacy={"retention_days": DAYS})
    run_prepare(ALONE, whole, tmp_path / "other/out")  # relative to the newest date of all rows, here of an order
    orders = pq.read_table(tmp_path / "orders.parquet")["at"].to_pylist()
    assert retained_since(tmp_path / "other/out") == max(orders).date() - timedelta(days=DAYS - 1)


def test_log_that_is_expired_daily_has_the_same_rows_as_without_expiry(tmp_path: Path) -> None:
    events = raw_events(16)
    write(tmp_path / "items.parquet", catalogue(7))
    write(tmp_path / "orders.parquet", raw_orders(events))
    for day in range(7, 18):
        write_days(tmp_path / "events", [row for row in events if row["ts"] < datetime(2024, 3, day)])
        for file in (tmp_path / "events").iterdir():
            if day % 2 and file.name < f"dt={since(day)}":  # on some days, the raw files are deleted too
                shutil.rmtree(file)
        out = prepare(tmp_path, day, retention_days=DAYS)
        expired = expire(store_of(tmp_path), since(day), [out])
        assert not expired.kept and min(event_days(tmp_path)) >= since(day)
        assert min(dates(out)) >= since(day)
    assert any("state_history" in name for name in expired.deleted)
    assert_same(found_rows(out), expected_without_retention(events, since(17), 17))


def test_expired_rows_are_not_made_or_read_again_while_their_raw_files_remain(tmp_path: Path) -> None:
    write_log(tmp_path, days=12)
    before = prepare(tmp_path, 13)
    expired = expire(store_of(tmp_path), since(13))
    assert len(expired.deleted) == 5 * 4  # requests, events, labels and a typed file of each date
    assert min(event_days(tmp_path)) == since(13)
    there = files(tmp_path)
    after = prepare(tmp_path, 13, "again")
    made = {name for name in files(tmp_path) if name not in there}
    assert {name: files(tmp_path)[name] for name in there} == there
    assert not [name for name in made if "date=" in name or "file=" in name]
    kept = {name: one for name, one in digests(before).items() if name[-10:] >= str(since(13)) or "part=" in name}
    assert digests(after) == kept
    assert content(read_dataset(after), "users") == content(read_dataset(before), "users")
    assert expire(store_of(tmp_path), since(13)).deleted == ()
    with pytest.raises(DataError, match=f"the log's first event that is kept is on {since(13)}"):
        prepare(tmp_path, 3)


def test_kept_snapshots_stay_whole_and_others_fail_verification(tmp_path: Path) -> None:
    write_log(tmp_path, days=12)
    old, other = prepare(tmp_path, 9), prepare(tmp_path, 13)
    expired = expire(store_of(tmp_path), since(13), keep=[old])
    listed = {entry.path for entry in read_dataset(old).snapshot.partitions}
    assert set(expired.kept) < listed and not listed & set(expired.deleted) and expired.deleted
    for entry in read_dataset(old).snapshot.partitions:
        read_dataset(old).verify_partition(entry)
    expire(store_of(tmp_path), since(13))
    with pytest.raises(CommitError, match="date=2024-03-0"):
        for entry in read_dataset(other).snapshot.partitions:
            read_dataset(other).verify_partition(entry)


def test_a_file_of_old_and_new_rows_keeps_the_new_ones(tmp_path: Path) -> None:
    events = raw_events(12)
    for name, rows in (("a", events[:200]), ("b", events[200:])):  # five days, seven days
        write(tmp_path / f"events/{name}.parquet", rows)
    write(tmp_path / "items.parquet", catalogue(7))
    write(tmp_path / "orders.parquet", raw_orders(events))
    prepare(tmp_path, 13)

    expired = expire(store_of(tmp_path), date(2024, 3, 4))
    assert len(expired.shortened) == 2 and all(name.startswith("raw/") for name in expired.shortened)
    assert min(event_days(tmp_path)) == date(2024, 3, 4)
    assert expire(store_of(tmp_path), date(2024, 3, 4)).shortened == ()
    there = files(tmp_path)
    out = prepare(tmp_path, 13, "again")
    assert {name: files(tmp_path)[name] for name in there if name in files(tmp_path)} == there
    assert min(dates(out)) == date(2024, 3, 4)


def test_late_event_remakes_dates_from_the_kept_rows_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = write_log(tmp_path, days=12)
    prepare(tmp_path, 13)
    expire(store_of(tmp_path), since(13))
    capfd.readouterr()
    late = [events[0] | {"eid": f"late{n}", "ts": FIRST + timedelta(days=n, hours=1)} for n in (2, 6)]
    write_days(tmp_path / "late", late)
    shutil.copytree(tmp_path / "late/dt=2024-03-07", tmp_path / "events/late")
    shutil.copytree(tmp_path / "late/dt=2024-03-03", tmp_path / "events/too late")  # of a date that is deleted
    out = prepare(tmp_path, 13, "again")
    err = capfd.readouterr().err
    assert "dates from 2024-03-07 on: histories and counts begin on 2024-03-06, as earlier rows are no longer" in err
    assert "events: 1 rows are older than the retention and are left out" in err
    assert min(dates(out)) == since(13) and sum(len(rows) for rows in found_rows(out).values()) == 7 * 40 + 1


def test_wrong_store_is_refused_and_nothing_is_deleted(tmp_path: Path) -> None:
    write_log(tmp_path / "a", days=6)
    write_log(tmp_path / "b", days=6)
    prepare(tmp_path / "a", 7)
    other = prepare(tmp_path / "b", 7)
    there = files(tmp_path / "a")
    with pytest.raises(DataError, match="is a snapshot of .*b/runs/store, not of .*a/runs/store"):
        expire(store_of(tmp_path / "a"), date(2024, 3, 6), [other])
    assert files(tmp_path / "a") == there
    with pytest.raises(DataError, match="is no store of a raw log"):
        expire(Store(tmp_path / "b"), date(2024, 3, 6))


def test_interrupted_expiry_is_finished_by_the_next(tmp_path: Path) -> None:
    write_log(tmp_path, days=8)
    prepare(tmp_path, 9)
    (place,) = (store_of(tmp_path).path / "events/date=2024-03-02").iterdir()
    (place / MANIFEST).unlink()
    expired = expire(store_of(tmp_path), date(2024, 3, 4))
    assert not place.exists() and f"events/date=2024-03-02/{place.name}" in expired.deleted


def test_command_keeps_its_snapshot_and_prints_what_it_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log(tmp_path, days=12)
    free = prepare(tmp_path, 10)
    out = prepare(tmp_path, 13, retention_days=DAYS)

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["expire", *words])
        command.main()
        return capsys.readouterr().out

    printed = run("--snapshot", str(out))
    assert printed.startswith(f"rows before {since(13)}: ") and "\n  events/date=2024-03-01/" in printed
    for entry in read_dataset(out).snapshot.partitions:
        read_dataset(out).verify_partition(entry)
    assert "rows before 2024-03-07" in run("--snapshot", str(out), "--before", "2024-03-07")
    with pytest.raises(SystemExit):
        run("--snapshot", str(free))
    assert "without prepare.source.privacy.retention_days; give --before" in capsys.readouterr().err


def test_retention_shorter_than_the_look_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="privacy.retention_days: 5 must be at least 6"):
        parse(PrepareConfig, log_config(tmp_path, privacy={"retention_days": 5}), "test")
