"""A growing log: what another day makes, what is unchanged, and that snapshots know nothing from after their end."""

import json
import shutil
from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import CommitError
from sidestack.infra.impressions import all_columns
from sidestack.infra.manifest import MANIFEST, read_manifest
from sidestack.infra.partitions import LISTS
from sidestack.infra.snapshot import SNAPSHOT_FILE, Dataset, read_dataset
from sidestack.infra.store import Store
from tests.datasets import content, joined
from tests.pipelines.prepare.growing import (
    add_day,
    add_items,
    day_at,
    day_file,
    masked,
    read,
    rewrite,
    tables_config,
    without_counts,
    write_folder,
)
from tests.pipelines.prepare.running import digests, leftovers, run_prepare

DAY_TABLES = ("events", "labels", "requests")


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return inode, time of change and bytes of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record every partition that is made from now on."""
    made: list[tuple[str, str]] = []
    whole = Store.new_partition

    def making(self: Store, table: str, slice_name: str, *rest: Any) -> Any:
        made.append((table, slice_name))
        return whole(self, table, slice_name, *rest)

    monkeypatch.setattr(Store, "new_partition", making)
    return made


def lists_of(out: Path) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = json.loads((out / SNAPSHOT_FILE).read_text())["lists"]
    return lists


@pytest.mark.parametrize("days", [2, 9])
def test_new_day_and_new_part_of_items_make_only_their_own_partitions(days: int, tmp_path: Path) -> None:
    """For any length of the log, only the day, the part, and the lists of the day's month and the part are written."""
    own = without_counts(write_folder(tmp_path / "own", days, items=48 if days == 2 else 60))
    run_prepare(ALONE, tables_config(own, test_days=1), tmp_path / "first")
    before, snapshot = state(tmp_path / "store"), state(tmp_path / "first")
    add_day(own, day_at(days))
    if days == 2:
        add_items(own, 48, 60, "part-00001.parquet")
    run_prepare(ALONE, tables_config(own, test_days=1), tmp_path / "second")

    after = state(tmp_path / "store")
    assert {name: after[name] for name in before} == before and state(tmp_path / "first") == snapshot
    written = sorted(after.keys() - before.keys())
    new = [name for name in written if not name.startswith(LISTS)]
    expected = [f"{table}/date={day_at(days)}" for table in DAY_TABLES] + ["items/part=00001"] * (days == 2)
    assert sorted({"/".join(name.split("/")[:2]) for name in new}) == sorted(expected)
    assert sorted(Path(name).name for name in new) == sorted(["part-00000.parquet", MANIFEST] * len(expected))

    first, second = (digests(tmp_path / name) for name in ("first", "second"))
    assert second.keys() - first.keys() == set(expected)
    assert {name: second[name] for name in first} == first
    dataset = read_dataset(tmp_path / "second")
    dataset.verify(ALONE, dataset.snapshot.partitions)
    assert dataset.dates() == [day_at(number) for number in range(days + 1)] and dataset.spec.num_items == 60
    bytes_written = sum(len(after[name][2]) for name in new)
    described = sum(
        file.bytes
        for entry in dataset.snapshot.partitions
        if f"{entry.table}/{entry.slice}" in expected
        for file in read_manifest(dataset.store / entry.path).files.values()
    )
    manifests = sum(len(after[name][2]) for name in new if name.endswith(MANIFEST))
    assert bytes_written == described + manifests < 60_000
    lists = {digest for digests in lists_of(tmp_path / "second").values() for digest in digests}
    known = {digest for digests in lists_of(tmp_path / "first").values() for digest in digests}
    assert {Path(name).stem for name in written if name.startswith(LISTS)} == lists - known
    assert len(lists - known) == len(DAY_TABLES) + (days == 2)
    assert {path.name for path in (tmp_path / "second").iterdir()} == {
        "snapshot.json", "dataset.json", MANIFEST, "summary.json",
    }  # fmt: skip
    assert leftovers(tmp_path) == []


def test_running_again_makes_nothing_and_lists_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_folder(tmp_path / "own", 3)
    run_prepare(ALONE, tables_config(own), tmp_path / "first")
    made = watched(monkeypatch)
    for file in own.rglob("*.parquet"):
        file.touch()  # another time of change, the same content
    run_prepare(ALONE, tables_config(own), tmp_path / "second")
    assert made == []
    for name in ("snapshot.json", "dataset.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert read_manifest(tmp_path / "second").digest == read_manifest(tmp_path / "first").digest


def test_a_changed_day_is_made_beside_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_folder(tmp_path / "own", 3)
    run_prepare(ALONE, tables_config(own), tmp_path / "first")
    earlier = joined(tmp_path / "first", ["item_id", "click"])
    made = watched(monkeypatch)
    file = day_file(own, day_at(1))
    rewrite(file, read(file).slice(0, 30))
    run_prepare(ALONE, tables_config(own), tmp_path / "second")
    assert sorted(made) == [(table, "date=2024-01-02") for table in DAY_TABLES]
    assert joined(tmp_path / "second", ["item_id"]).num_rows == 130
    assert joined(tmp_path / "first", ["item_id", "click"]).equals(earlier)


def test_later_labels_make_only_partitions_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A date's labels are in their own file, which is rewritten when more of them are known."""
    own = write_folder(tmp_path / "own", 3)
    file, day = day_file(own, day_at(2)), day_at(2)
    rows = read(file)
    labels = rows.select(["click", "conversion"])
    unknown = labels.set_column(1, "conversion", pa.nulls(50, pa.int8()))
    rewrite(file, rows.drop_columns(["click", "conversion"]))
    rewrite(day_file(own, day, "labels"), unknown)
    run_prepare(ALONE, tables_config(own), tmp_path / "first")
    made = watched(monkeypatch)
    rewrite(day_file(own, day, "labels"), labels)
    run_prepare(ALONE, tables_config(own), tmp_path / "second")
    assert made == [("labels", f"date={day}")]
    found = [joined(tmp_path / name, ["conversion"], day, day)["conversion"] for name in ("first", "second")]
    assert found[0].null_count == 50 and found[1].combine_chunks().equals(labels["conversion"].combine_chunks())


def test_missing_or_altered_partition_is_named(tmp_path: Path) -> None:
    own = write_folder(tmp_path / "own", 3)
    run_prepare(ALONE, tables_config(own), tmp_path / "out")
    dataset = read_dataset(tmp_path / "out")
    entry = dataset.partitions("events")[1]
    place = dataset.store / entry.path
    (place / "part-00000.parquet").write_bytes((place / "part-00000.parquet").read_bytes()[:-1] + b"?")
    with pytest.raises(CommitError, match=rf"{entry.path}/part-00000.parquet: SHA-256 .* the file was altered"):
        dataset.verify(ALONE, dataset.snapshot.partitions)
    shutil.rmtree(place)
    with pytest.raises(CommitError, match=rf"{entry.path}: not a committed directory"):
        dataset.verify(ALONE, dataset.snapshot.partitions)


# ---- what a snapshot knows, as of a date

Snapshots = dict[date, Path]
SYNTHETIC = {
    "kind": "synthetic", "num_items": 60, "num_users": 20, "events_per_day": 40, "impressions_per_request": 4,
    "train_days": 2, "test_days": 4, "followup_days": 2,
}  # fmt: skip


def own_config(folder: Path) -> Callable[[date], dict[str, Any]]:
    return lambda end: tables_config(folder, as_of=end, test_days=1, followup_days={"conversion": 2})


def taken(folder: Path, config: Callable[[date], dict[str, Any]], ends: list[date]) -> Snapshots:
    """Take a snapshot as of each date, all beside one store."""
    for end in ends:
        run_prepare(ALONE, config(end), folder / f"as-of-{end}")
    return {end: folder / f"as-of-{end}" for end in ends}


@pytest.fixture(scope="module", params=["synthetic", "tables"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshots, Path]:
    """Take snapshots as of each of five dates, and one of the whole log, which knows all labels."""
    folder = tmp_path_factory.mktemp("log")
    ends = [day_at(number) for number in range(2, 7)]
    if request.param == "synthetic":
        run_prepare(ALONE, {"source": {**SYNTHETIC, "test_days": 8}}, folder / "whole" / "out")
        return taken(folder, lambda end: {"source": SYNTHETIC, "as_of": str(end)}, ends), folder / "whole" / "out"
    own = without_counts(write_folder(folder / "own", 6, items=48))
    add_items(own, 48, 60, f"date={day_at(2)}/part-00000.parquet")
    run_prepare(ALONE, tables_config(own), folder / "whole" / "out")
    return taken(folder, own_config(own), ends), folder / "whole" / "out"


def rows_before(out: Path, end: date) -> pa.Table:
    dataset = read_dataset(out)
    return joined(out, all_columns(dataset), last=end - timedelta(days=1))


def newest_time(rows: pa.Table) -> datetime:
    """Return the newest time in the events and histories of rows."""
    return max(pc.max(rows["event_time"]).as_py(), pc.max(pc.list_flatten(rows["history_times"])).as_py())


def test_a_snapshot_is_the_log_cut_at_its_end(log: tuple[Snapshots, Path]) -> None:
    """No row, history entry or feature from its end or later; no label whose follow-up was not over by then."""
    snapshots, whole = log
    for end, out in snapshots.items():
        found, expected = rows_before(out, date.max), rows_before(whole, end)
        midnight = datetime.combine(end, datetime.min.time())
        assert newest_time(found) < midnight and found.num_rows > 0
        assert found.drop_columns(["conversion"]).equals(expected.drop_columns(["conversion"]))
        is_known = [at + timedelta(days=2) < midnight for at in expected["event_time"].to_pylist()]
        assert found["conversion"].combine_chunks().equals(masked(expected["conversion"], is_known))
        assert read_dataset(out).snapshot.as_of == midnight


def test_later_items_are_in_no_earlier_snapshot(log: tuple[Snapshots, Path]) -> None:
    snapshots, whole = log
    items = content(read_dataset(whole), "items")
    is_growing = len(read_dataset(whole).partitions("items")) == 2
    for end, out in snapshots.items():
        known = 48 if is_growing and end <= day_at(2) else 60
        dataset = read_dataset(out)
        assert dataset.spec.num_items == known and content(dataset, "items").equals(items.slice(0, known))
        assert pc.max(content(dataset, "events")["item_id"]).as_py() < known


def test_labels_mature_later_and_nothing_else_is_made_again(log: tuple[Snapshots, Path]) -> None:
    """From one date to the next, only the new date's partitions and the labels whose two days have ended are made."""
    snapshots, _ = log
    ends = list(snapshots)
    for before, after in zip(ends, ends[1:], strict=False):
        old, new = digests(snapshots[before]), digests(snapshots[after])
        dated = {name for name in new if not name.startswith(("items", "users")) and old.get(name) != new[name]}
        matured = [after - timedelta(days=3)] if after - timedelta(days=3) >= day_at(0) else []
        assert dated == {f"{table}/date={before}" for table in DAY_TABLES} | {f"labels/date={day}" for day in matured}


def test_each_date_is_made_once_and_its_labels_twice(log: tuple[Snapshots, Path]) -> None:
    """A date's labels are made once before any follow-up ended and once after all ended, not on each date between."""
    snapshots, _ = log
    store = read_dataset(next(iter(snapshots.values()))).store
    for table in ("events", "requests"):
        assert {path.parent.name: 1 for path in store.glob(f"{table}/*/*")} == {
            f"date={day_at(number)}": len(list((store / table / f"date={day_at(number)}").iterdir()))
            for number in range(6)
        }
    labels = {day.name: len(list(day.iterdir())) for day in (store / "labels").iterdir()}
    ends = list(snapshots)
    expected = {}
    for number in range(6):
        seen = [end for end in ends if end > day_at(number)]
        over = [end for end in seen if end >= day_at(number + 3)]
        expected[f"date={day_at(number)}"] = bool(over) + (len(over) < len(seen))
    assert labels == expected


def test_tables_of_a_date_stay_row_aligned_when_labels_are_made_again(log: tuple[Snapshots, Path]) -> None:
    """In the newest snapshot, the labels were made by another run than the events."""
    snapshots, whole = log
    dataset: Dataset = read_dataset(snapshots[day_at(6)])
    assert joined(dataset.path, ["request_id", "click"]).equals(joined(whole, ["request_id", "click"], last=day_at(5)))


def test_a_synthetic_log_as_of_a_date_is_the_shorter_log(tmp_path: Path) -> None:
    """Both list the same partitions."""
    run_prepare(ALONE, {"source": SYNTHETIC, "as_of": str(day_at(4))}, tmp_path / "as-of" / "out")
    run_prepare(ALONE, {"source": {**SYNTHETIC, "test_days": 2}}, tmp_path / "short" / "out")
    assert digests(tmp_path / "as-of" / "out") == digests(tmp_path / "short" / "out")
