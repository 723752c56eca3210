"""Faulty raw logs: repairs are counted and logged, and all other faults are named in one error."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.prepare.config import PrepareConfig
from tests.datasets import content, joined
from tests.pipelines.prepare.log.raw import FIRST, catalogue, log_config, raw_events, raw_orders, write, write_log
from tests.pipelines.prepare.running import leftovers, run_prepare


def test_all_faults_of_all_files_are_one_error(tmp_path: Path) -> None:
    rows = [row | {"price": "cheap", "ts": row["ts"].timestamp() * 1000} for row in raw_events(2)]
    for row in rows:
        del row["device"]
    write(tmp_path / "events/a.parquet", rows)
    write(tmp_path / "items.parquet", [{"sku": 1.5, "vec": [1.0, float("nan"), 0.0], "kind": "k"}])
    write(tmp_path / "orders.parquet", [{"uid": "u", "sku": "i", "at": "soon", "state": "p"}])
    with pytest.raises(DataError) as caught:
        run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the raw log has 6 faults:"
    for fault in (
        r"a.parquet: column 'device' is missing (events); the file has eid, price,",
        "a.parquet: column 'price' (VARCHAR) must be a finite number; 80 rows do not, such as 'cheap'",
        "a.parquet: column 'ts' (DOUBLE) must be a time from 1971-01-01 on and before 2100-01-01 (unit s, zone UTC)",
        "items.parquet: column 'sku' (DOUBLE) must be an id: text or a whole number; 1 rows do not, such as '1.5'",
        "items.parquet: column 'vec' (DOUBLE[]) must be a list of finite numbers",
        "orders.parquet: column 'at' (VARCHAR) must be a time",
    ):
        assert sum(fault in line for line in lines[1:]) == 1, fault
    assert leftovers(tmp_path) == [] and not (tmp_path / "runs/store").exists()


def test_invalid_condition_is_named(tmp_path: Path) -> None:
    write_log(tmp_path, days=2)
    config = log_config(tmp_path)
    config["source"]["tasks"]["click"]["where"] = "no_such_column = 1"
    with pytest.raises(DataError, match="condition of 'click': Binder Error: .*no_such_column"):
        run_prepare(ALONE, config, tmp_path / "runs/out")


def test_rows_without_an_id_are_left_out_and_too_many_are_an_error(tmp_path: Path) -> None:
    events = write_log(tmp_path, days=4)
    lost = [events[0] | {"eid": "lost", "uid": None, "ts": events[0]["ts"].replace(tzinfo=UTC)}]
    write(tmp_path / "events/dt=2024-03-01/more.parquet", [*lost, *(
        row | {"eid": f"more{n}", "ts": row["ts"].replace(tzinfo=UTC)} for n, row in enumerate(events[:30])
    )])  # fmt: skip
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    assert joined(tmp_path / "runs/out", ["user_id"]).num_rows == len(events) + 30
    with pytest.raises(DataError, match="1 of 31 rows lack user_key, item_key, event_time; at most 1% may"):
        run_prepare(ALONE, log_config(tmp_path, max_dropped=0.01), tmp_path / "other/out")


def test_items_missing_from_the_catalogue_have_no_content_and_too_many_are_an_error(tmp_path: Path) -> None:
    write_log(tmp_path, days=4, listed=7)
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    items = content(read_dataset(tmp_path / "runs/out"), "items").to_pylist()
    assert {row["item_key"] for row in items if row["vec"] is None} == {"i07", "i08"}
    assert all((row["kind"] is None) == (row["item_key"] > "i06") for row in items)
    with pytest.raises(DataError, match=r"events: 15.6% of 160 are of items that the catalogue lacks \(2 of them\)"):
        run_prepare(ALONE, log_config(tmp_path, max_unknown_items=0.1), tmp_path / "other/out")


def test_first_of_several_values_is_taken_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = write_log(tmp_path, days=4)
    rows = [
        row | {"ts": row["ts"].replace(tzinfo=UTC), "device": [["d0", "d1"], [None, "d1"], []][n % 3]}
        for n, row in enumerate(events)
    ]
    for file in (tmp_path / "events").rglob("*.parquet"):
        file.unlink()
    write(tmp_path / "events/all.parquet", rows)
    kinds = [["k0", "k1"], ["k1"], [], None, [None], [None, "k2", "k0"], ["k2"]]
    write(tmp_path / "items.parquet", [row | {"kind": kind} for row, kind in zip(catalogue(7), kinds, strict=True)])
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    err = capsys.readouterr().err
    assert "prepare: items: 2 rows have several values of 'kind'; the first is taken" in err
    assert f"prepare: events: {len(events[::3])} rows have several values of 'device'; the first is taken" in err
    items = content(read_dataset(tmp_path / "runs/out"), "items").to_pylist()
    found = {row["item_key"]: row["kind"] for row in items}
    named = {kind: found[key] for key, kind in (("i00", "k0"), ("i01", "k1"), ("i06", "k2"))}
    assert len(set(named.values())) == 3 and found["i05"] == named["k2"]
    assert [found[key] for key in ("i02", "i03", "i04")] == [None] * 3
    devices = [row["device"] for row in joined(tmp_path / "runs/out", ["device"]).to_pylist()]
    assert sorted(map(len, devices)) == [0] * len(events[2::3]) + [1] * (len(events) - len(events[2::3]))


@pytest.mark.parametrize("times", ["seconds", "milliseconds", "nanoseconds", "zoned", "text", "local"])
def test_times_in_any_form_are_read_as_the_same_times(times: str, tmp_path: Path) -> None:
    events = raw_events(3)
    zone, unit = "UTC", "s"

    def of(at: datetime) -> Any:
        epoch = at.replace(tzinfo=UTC)
        shown: dict[str, Any] = {
            "seconds": epoch.timestamp(), "milliseconds": int(epoch.timestamp() * 1000),
            "nanoseconds": int(epoch.timestamp()) * 1_000_000_000, "zoned": epoch,
            "text": f"{at + timedelta(hours=2):%Y-%m-%dT%H:%M:%S}+02:00", "local": at + timedelta(hours=1),
        }  # fmt: skip
        return shown[times]

    zone = "Europe/Berlin" if times == "local" else zone
    unit = {"milliseconds": "ms", "nanoseconds": "ns"}.get(times, unit)
    write(tmp_path / "events/a.parquet", [row | {"ts": of(row["ts"])} for row in events])
    write(tmp_path / "items.parquet", catalogue(7))
    write(tmp_path / "orders.parquet", raw_orders(events))
    config = log_config(tmp_path)
    config["source"]["events"]["time"] = {"column": "ts", "unit": unit, "zone": zone}
    run_prepare(ALONE, config, tmp_path / "runs/out")
    assert sorted(joined(tmp_path / "runs/out", ["event_time"])["event_time"].to_pylist()) == sorted(
        row["ts"] for row in events
    )


def test_csv_ids_keep_their_zeros_and_hidden_and_empty_files_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    lines = ["user\titem\twhen\tclicked"]
    times = [int((FIRST + timedelta(hours=5 * n)).replace(tzinfo=UTC).timestamp()) for n in range(40)]
    lines += [f"00{n % 3}\t{n % 4}\t{at}\t{n % 2}" for n, at in enumerate(times)]
    (folder / "a.tsv").write_text("\n".join(lines) + "\n")
    (folder / "_SUCCESS").write_text("")
    (folder / "empty.csv").write_text("")
    (folder / ".hidden.csv").write_text("no,log\n1,2\n")
    (folder / "_tmp").mkdir()
    (folder / "_tmp/b.csv").write_text("no,log\n1,2\n")
    source = {"kind": "log", "events": {"path": str(folder), "user": "user", "item": "item", "time": "when"},
              "tasks": {"click": {"where": "clicked = 1"}}}  # fmt: skip
    run_prepare(ALONE, {"source": source, "cache_dir": f"{tmp_path}/cache"}, tmp_path / "runs/out")
    assert content(read_dataset(tmp_path / "runs/out"), "users")["user_key"].to_pylist() == ["000", "001", "002"]
    assert joined(tmp_path / "runs/out", ["click"])["click"].to_pylist().count(1) == 20


def test_a_catalogue_that_grows_and_changes_keeps_ids_and_published_rows(tmp_path: Path) -> None:
    write_log(tmp_path, days=4, items=12)
    config = log_config(tmp_path)
    run_prepare(ALONE, config, tmp_path / "runs/first")
    changed = [row | ({"vec": [0.0, 2.0, 0.0]} if row["sku"] == "i02" else {}) for row in catalogue(10)]
    write(tmp_path / "items.parquet", changed)
    run_prepare(ALONE, config, tmp_path / "runs/second")
    first, second = (read_dataset(tmp_path / f"runs/{name}") for name in ("first", "second"))
    keys = [content(dataset, "items")["item_key"].to_pylist() for dataset in (first, second)]
    assert keys[1][: len(keys[0])] == keys[0]
    # All items were known before, so the second part has only revised rows.
    assert [entry.facts["new"] for entry in second.partitions("items")] == [12, 0]
    newest = content(second, "items").to_pylist()[keys[1].index("i02", len(keys[0]))]
    assert np.allclose(newest["vec"], [0, 1, 0]) and newest["item_id"] == keys[0].index("i02")


def test_one_file_with_two_contents_of_an_item_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path, days=3)
    write(tmp_path / "items.parquet", [*catalogue(7), *catalogue(2), {**catalogue(4)[3], "kind": "other"}])
    with pytest.raises(DataError, match=r"items.parquet: 1 items have several contents; 'i03' has 2"):
        run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")


def test_vectors_must_have_one_length_and_zero_vectors_become_null(tmp_path: Path) -> None:
    write_log(tmp_path, days=3)
    items = catalogue(7)
    items[1]["vec"], items[2]["vec"] = [0.0, 0.0, 0.0], [1e30, 0.0, 0.0]
    write(tmp_path / "items.parquet", items)
    run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")
    vectors = content(read_dataset(tmp_path / "runs/out"), "items")["vec"].to_pylist()
    assert vectors[1] is None and vectors[2] == [1.0, 0.0, 0.0]
    items[3]["vec"] = [1.0, 2.0]
    write(tmp_path / "items.parquet", items)
    with pytest.raises(
        DataError, match="items: column 'vec': embeddings must be of one length; there are 6 of 3 .*1 of 2"
    ):
        run_prepare(ALONE, log_config(tmp_path), tmp_path / "other/out")


def test_earlier_end_of_the_log_is_refused_when_ids_would_change(tmp_path: Path) -> None:
    write_log(tmp_path, days=4)
    (tmp_path / "items.parquet").unlink()
    config = log_config(tmp_path, items=None)
    run_prepare(ALONE, config, tmp_path / "runs/whole")
    with pytest.raises(DataError, match="prepare.as_of: .* needs a run.name of its own"):
        run_prepare(ALONE, config | {"as_of": str(date(2024, 3, 3))}, tmp_path / "runs/earlier")


def test_end_before_the_first_event_is_refused(tmp_path: Path) -> None:
    write_log(tmp_path, days=2)
    with pytest.raises(DataError, match="prepare.as_of: 2024-03-01: the log's first event is on 2024-03-01"):
        run_prepare(ALONE, log_config(tmp_path, as_of=date(2024, 3, 1)), tmp_path / "runs/out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {}}, "tasks: name at least one"),
        ({"tasks": {"buy": {"table": "shop", "within_days": 1}}}, "tasks.buy.table: 'shop' is not among labels"),
        ({"tasks": {"buy": {"table": "orders"}}}, "table and within_days go together"),
        ({"history": "order"}, "history: 'order' is known later"),
        ({"labels": {"orders": {"path": "x", "time": "at"}}}, "name either event_id, or user and item"),
    ],
)
def test_invalid_settings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PrepareConfig, log_config(tmp_path, **change), "prepare")


def test_tasks_in_a_circle_are_named(tmp_path: Path) -> None:
    write_log(tmp_path, days=4)
    given = {"seen": {}, "click": {"given": "order"}, "order": {"given": "click"}}
    with pytest.raises(ConfigError, match="given each other in a circle"):
        run_prepare(ALONE, log_config(tmp_path, labels={}, tasks=given), tmp_path / "runs/out")


def test_duplicate_file_is_named(tmp_path: Path) -> None:
    write_log(tmp_path, days=3)
    original = next((tmp_path / "events").rglob("*.parquet"))
    original.with_name("copy.parquet").write_bytes(original.read_bytes())
    with pytest.raises(DataError, match="part.parquet: is the same file as .*copy.parquet; remove one of them"):
        run_prepare(ALONE, log_config(tmp_path), tmp_path / "runs/out")


def test_a_condition_that_fails_on_a_value_is_named(tmp_path: Path) -> None:
    write_log(tmp_path, days=2)
    config = log_config(tmp_path)
    config["source"]["tasks"]["click"]["where"] = "CAST(uid AS INT) > 5"
    with pytest.raises(
        DataError, match="condition of 'click': Conversion Error: Could not convert string 'u.' to INT32"
    ):
        run_prepare(ALONE, config, tmp_path / "runs/out")
