"""The rows of a raw log: equal to plain loops, the same day by day as at once, and independent of later events."""

import shutil
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, joined
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
from tests.pipelines.prepare.log.reference import reference_rows
from tests.pipelines.prepare.running import digests, run_prepare

COUNTS = [
    f"{name}_{what}{window}"
    for name in ("user", "item", "user_category")
    for what in ("events", "positives")
    for window in ("", "_2d")
] + [f"{name}_log_odds" for name in ("user", "item", "user_category")]


def keys(out: Path, table: str, column: str) -> list[str]:
    found: list[str] = content(read_dataset(out), table)[column].to_pylist()
    return found


def found_rows(out: Path) -> dict[tuple[str, str, datetime], list[Row]]:
    """Return the rows by user, item and time; several rows may share them."""
    columns = [
        "user_id",
        "item_id",
        "event_time",
        "history_item_ids",
        "history_times",
        "click",
        "order",
        "price",
        *COUNTS,
    ]
    users, items = keys(out, "users", "user_key"), keys(out, "items", "item_key")
    rows: dict[tuple[str, str, datetime], list[Row]] = {}
    for row in joined(out, columns).to_pylist():
        history = zip((items[one] for one in row.pop("history_item_ids")), row.pop("history_times"), strict=True)
        place = (users[row.pop("user_id")], items[row.pop("item_id")], row.pop("event_time"))
        rows.setdefault(place, []).append({**row, "history": list(history)})
    return rows


def expected_rows(events: list[Row], **settings: Any) -> dict[tuple[str, str, datetime], list[Row]]:
    kinds = {row["sku"]: row["kind"] for row in catalogue(7)}
    by_id = reference_rows(events, raw_orders(events), kinds, **settings)
    rows: dict[tuple[str, str, datetime], list[Row]] = {}
    for event in events:
        if event["eid"] in by_id:
            rows.setdefault((event["uid"], event["sku"], event["ts"]), []).append(by_id[event["eid"]])
    return rows


def sorted_rows(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["price"], row["click"]))


def assert_same(found: dict[Any, list[Row]], expected: dict[Any, list[Row]]) -> None:
    assert found.keys() == expected.keys()
    for place, rows in expected.items():
        assert len(found[place]) == len(rows), place
        for one, other in zip(sorted_rows(found[place]), sorted_rows(rows), strict=True):
            assert one == {
                name: pytest.approx(v, abs=1e-6) if isinstance(v, float) else v for name, v in other.items()
            }, place


@pytest.mark.parametrize("delay_minutes", [0, 90, 2000])
def test_rows_match_plain_loops(delay_minutes: int, tmp_path: Path) -> None:
    events = write_log(tmp_path, days=6)
    run_prepare(ALONE, log_config(tmp_path, delay_minutes=delay_minutes), tmp_path / "runs/out")
    orders = raw_orders(events)
    end = datetime.combine(max(max(row["ts"] for row in events), max(row["at"] for row in orders)), datetime.min.time())
    found = found_rows(tmp_path / "runs/out")
    expected = expected_rows(events, end=end + timedelta(days=1), delay=timedelta(minutes=delay_minutes))
    assert_same(found, expected)
    spec = read_dataset(tmp_path / "runs/out").spec
    assert spec.request_dense == tuple(
        name for name in ("user_events", "user_positives", "user_events_2d", "user_positives_2d", "user_log_odds")
    )
    assert spec.sparse == {"device": 4} and spec.num_items == 9 and spec.tasks["order"].given == "click"
    assert spec.followup_days == {"order": 2}


def test_a_log_read_day_by_day_has_the_rows_of_the_log_read_at_once(tmp_path: Path) -> None:
    events = write_log(tmp_path, days=8)
    end = date(2024, 3, 9)
    for day in range(5, 9):
        run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 1 + day)), tmp_path / f"runs/as-of-{day}")
    (tmp_path / "whole").mkdir()
    run_prepare(ALONE, log_config(tmp_path, as_of=end), tmp_path / "whole/out")
    assert_same(found_rows(tmp_path / "runs/as-of-8"), found_rows(tmp_path / "whole/out"))
    assert_same(found_rows(tmp_path / "runs/as-of-8"), expected_rows(events, end=datetime(2024, 3, 9)))


def test_new_day_keeps_existing_files_and_reads_no_old_file_again(tmp_path: Path) -> None:
    events = raw_events(8)
    write(tmp_path / "items.parquet", catalogue(7))
    write(tmp_path / "orders.parquet", raw_orders([row for row in events if row["ts"] < FIRST + timedelta(days=5)]))
    write_days(tmp_path / "events", [row for row in events if row["ts"] < FIRST + timedelta(days=7)])
    run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 8)), tmp_path / "runs/first")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/store").rglob("*") if path.is_file()}
    write_days(tmp_path / "events", [row for row in events if row["ts"] >= FIRST + timedelta(days=7)])
    run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 9)), tmp_path / "runs/second")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/store").rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    first, second = digests(tmp_path / "runs/first"), digests(tmp_path / "runs/second")
    changed = {name for name in second if first.get(name) != second[name]}
    new = {f"{table}/date=2024-03-08" for table in ("requests", "events", "labels")}
    assert changed == new | {"labels/date=2024-03-06"}  # its follow-up of two days has ended
    raw = {
        path.relative_to(tmp_path / "runs/store/raw").parts[0]
        for path in after.keys() - before.keys()
        if "raw" in path.parts
    }
    assert raw <= {"events", "state_user", "state_item", "state_user_category", "state_history"}


def test_later_events_do_not_change_earlier_dates(tmp_path: Path) -> None:
    """Two logs that differ from a day on have the same bytes for all earlier days."""
    events = raw_events(6)
    other = [row for row in events if row["ts"] < FIRST + timedelta(days=4)]
    other += [
        row | {"sku": "i03", "action": "click", "price": 9.0}
        for row in events
        if row["ts"] >= FIRST + timedelta(days=4)
    ]
    found = []
    for name, log in (("a", events), ("b", other)):
        write_days(tmp_path / name / "events", log)
        write(tmp_path / name / "items.parquet", catalogue(7))
        write(tmp_path / name / "orders.parquet", raw_orders(events))
        run_prepare(ALONE, log_config(tmp_path / name, as_of=date(2024, 3, 7)), tmp_path / name / "runs/out")
        of_days = digests(tmp_path / name / "runs/out")
        found.append(
            {
                at: digest
                for at, digest in of_days.items()
                if at.endswith(tuple(f"2024-03-0{day}" for day in range(1, 5)))
            }
        )
    assert found[0] == found[1] and len(found[0]) == 3 * 4


def test_duplicate_rows_in_any_order_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = raw_events(4)
    (tmp_path / "b").mkdir()
    write_days(tmp_path / "a/events", events)
    write_days(tmp_path / "b/events", list(reversed(events)) + events)
    for name in ("a", "b"):
        write(tmp_path / name / "items.parquet", catalogue(7))
        write(tmp_path / name / "orders.parquet", raw_orders(events))
        run_prepare(ALONE, log_config(tmp_path / name), tmp_path / name / "runs/out")
    assert_same(found_rows(tmp_path / "a/runs/out"), found_rows(tmp_path / "b/runs/out"))
    assert "prepare: 160 rows of events came twice and count once" in capsys.readouterr().err


def test_category_that_is_added_later_changes_no_date(tmp_path: Path) -> None:
    """A date that is made again has the same counts, which are by the category in the item's first part."""
    events = raw_events(8)
    write(tmp_path / "orders.parquet", raw_orders(events))
    write(tmp_path / "items.parquet", [row | {"kind": None} if row["sku"] < "i03" else row for row in catalogue(9)])
    write_days(tmp_path / "events", [row for row in events if row["ts"] < FIRST + timedelta(days=7)])
    run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 8)), tmp_path / "runs/first")
    write(tmp_path / "items.parquet", catalogue(9))
    write_days(tmp_path / "events", [row for row in events if row["ts"] >= FIRST + timedelta(days=7)])
    run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 9)), tmp_path / "runs/grown")
    grown = digests(tmp_path / "runs/grown")
    assert {"items/part=00000", "items/part=00001"} <= grown.keys()
    store = tmp_path / "runs/store"
    for folder in [*(store / table for table in ("requests", "events", "labels")), *(store / "raw").glob("state_*")]:
        shutil.rmtree(folder)
    run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 9)), tmp_path / "runs/rebuilt")
    assert digests(tmp_path / "runs/rebuilt") == grown


def test_label_rows_without_an_event_are_counted_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = write_log(tmp_path, days=4)
    did = {(row["uid"], row["sku"]) for row in events}
    user, item = next((f"u{u}", f"i{i:02d}") for u in range(6) for i in range(9) if (f"u{u}", f"i{i:02d}") not in did)
    strays = [
        {"uid": events[0]["uid"], "sku": events[0]["sku"], "at": FIRST - timedelta(hours=1), "state": "p"},
        {"uid": user, "sku": item, "at": FIRST + timedelta(days=1), "state": "p"},
        {"uid": "nobody", "sku": "i01", "at": FIRST + timedelta(days=1), "state": "p"},
        {"uid": "nobody", "sku": "i01", "at": FIRST + timedelta(days=1), "state": "c"},
    ]
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/none")
    assert "match no event" not in capsys.readouterr().err
    write(tmp_path / "orders.parquet", raw_orders(events) + strays)
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    line = "prepare: orders: 1 rows lie before their event and 2 match no event (order); they count for nothing"
    assert line in capsys.readouterr().err


def test_requests_are_defined_by_a_column_or_by_user_and_time(tmp_path: Path) -> None:
    events = [row | {"session": f"s{number // 5}-{row['uid']}"} for number, row in enumerate(raw_events(4))]
    schema = pa.schema({**{name: pa.string() for name in ("eid", "device", "uid", "sku", "action", "session")},
                        "price": pa.float64(), "ts": pa.timestamp("us")})  # fmt: skip
    write(tmp_path / "events/all.parquet", events, schema)
    write(tmp_path / "items.parquet", catalogue(7))
    write(tmp_path / "orders.parquet", raw_orders(events))
    config = log_config(tmp_path)
    run_prepare(ALONE, config, tmp_path / "runs/by-time")
    config["source"]["events"]["request"] = "session"
    run_prepare(ALONE, config, tmp_path / "runs/by-session")
    counts = [
        len(
            {
                (row["user_id"], row["request_id"])
                for row in joined(tmp_path / f"runs/{name}", ["user_id", "request_id"]).to_pylist()
            }
        )
        for name in ("by-time", "by-session")
    ]
    assert counts == [
        len({(row["uid"], row["ts"]) for row in events}), len({(row["session"], row["ts"].date()) for row in events}),
    ]  # fmt: skip


def test_negatives_are_drawn_for_a_log_of_positives_and_named_in_its_origin(tmp_path: Path) -> None:
    events = [row | {"action": "click"} for row in raw_events(5, items=30)]
    write_days(tmp_path / "events", events)
    write(tmp_path / "items.parquet", catalogue(30))
    config = log_config(tmp_path, negatives=3, labels={}, tasks={"click": {}})
    run_prepare(ALONE, config, tmp_path / "runs/out")
    run_prepare(ALONE, config | {"cache_dir": f"{tmp_path}/other"}, tmp_path / "again/out")
    rows = joined(tmp_path / "runs/out", ["user_id", "item_id", "event_time", "click", "user_events"])
    assert rows.equals(joined(tmp_path / "again/out", ["user_id", "item_id", "event_time", "click", "user_events"]))
    drawn = [row for row in rows.to_pylist() if row["click"] == 0]
    did = {(row["user_id"], row["item_id"], row["event_time"].date()) for row in rows.to_pylist() if row["click"] == 1}
    of_draws = len(drawn) / (3 * len(events))  # 0.66 is expected: other draws are items that the user has that date
    assert rows.num_rows - len(drawn) == len(events) and 0.6 < of_draws < 0.72
    assert not any((row["user_id"], row["item_id"], row["event_time"].date()) in did for row in drawn)
    assert "3 items drawn for each event" in read_dataset(tmp_path / "runs/out").spec.origin
