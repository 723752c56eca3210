"""Snapshots: validation of the list of partitions, finding files, and verifying partitions against the list."""

import json
import shutil
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import CommitError, ConfigError, DataError, SidestackError
from sidestack.infra.manifest import read_manifest, verify
from sidestack.infra.partitions import PartitionEntry, PartitionFile, date_slice, entry_of, list_file, slice_date
from sidestack.infra.snapshot import SNAPSHOT_FILE, SidSet, Snapshot, read_dataset, write_snapshot
from tests.datasets import write_snapshot_of
from tests.distributed import run_distributed
from tests.infra.made_up import DAYS, SPEC, requests, table
from tests.infra.test_store import items


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    days = {day: table(requests(day, [3, 2, 4])) for day in DAYS}
    parts = [items([0, 1, 2]), items([1, 3, 4])]
    return write_snapshot_of(tmp_path_factory.mktemp("made") / "out", SPEC, parts, (), days)


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """Return a copy of the snapshot with its store, which a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def entry(table: str, slice_name: str, rows: tuple[int, ...] = (5,), columns: str = "c") -> PartitionEntry:
    files = tuple(PartitionFile(name=f"part-{number:05d}.parquet", rows=one) for number, one in enumerate(rows))
    path = f"{table}/{slice_name}/key"
    return PartitionEntry(table=table, slice=slice_name, path=path, digest="d", columns=columns, files=files)


def day(number: int, **rows: tuple[int, ...]) -> list[PartitionEntry]:
    """Return a date's three partitions, of five rows unless other numbers are given."""
    slice_name = date_slice(date(2020, 1, number))
    return [entry(name, slice_name, rows.get(name, (5,))) for name in ("events", "labels", "requests")]


def snapshot(partitions: list[PartitionEntry], **values: Any) -> Snapshot:
    listed = sorted(partitions, key=lambda one: one.table)
    return parse(Snapshot, {"store": "store", "partitions": tuple(listed), **values}, "test")


SIDS = "sids/text/abc"
BAD_LISTS: dict[str, tuple[list[PartitionEntry], str]] = {
    "twice": ([*day(1), *day(1)], "partitions: events/date=2020-01-01 is listed twice"),
    "out of order": (
        [*day(2), *day(1)],
        "partitions: events/date=2020-01-01 is listed after events/date=2020-01-02: out of order",
    ),
    "parts out of order": (
        [entry("items", "part=00001"), entry("items", "part=00000")],
        "partitions: items/part=00000 is listed after items/part=00001: out of order",
    ),
    "other columns": (
        [entry("items", "part=00000"), entry("items", "part=00001", columns="other")],
        "partitions: items/part=00001/key and items/part=00000/key have different columns or types",
    ),
    "no labels of a date": (
        [*day(1), *day(2)[:1], *day(2)[2:]],
        "partitions: date=2020-01-02 is listed of only one of events and labels",
    ),
    "no requests": (day(1)[:2], "partitions: date=2020-01-01 is listed of only one of events and requests"),
    "no events": (day(1)[1:], "partitions: date=2020-01-01 is listed of only one of events and requests"),
    "requests of another date": (
        [*day(1), entry("requests", date_slice(date(2020, 1, 2)))],
        "partitions: date=2020-01-02 is listed of only one of events and requests",
    ),
    "SIDs of some dates": (
        [*day(1), *day(2), entry(f"{SIDS}/events", date_slice(date(2020, 1, 1)))],
        f"partitions: date=2020-01-02 is listed of only one of events and {SIDS}/events",
    ),
    "SIDs of no items": (
        [entry(f"{SIDS}/items", "part=00000")],
        f"partitions: part=00000 is listed of only one of items and {SIDS}/items",
    ),
    "labels of fewer rows": (
        day(1, labels=(4,)),
        "labels/date=2020-01-01/key/part-00000.parquet has 4 rows, "
        "events/date=2020-01-01/key/part-00000.parquet has 5: they must be row-aligned",
    ),
    "SIDs of fewer rows": (
        [entry("items", "part=00000"), entry(f"{SIDS}/items", "part=00000", (6,))],
        "has 6 rows, items/part=00000/key/part-00000.parquet has 5: they must be row-aligned",
    ),
    "other files": (
        day(1, labels=(2, 3)),
        r"labels/date=2020-01-01/key has the files \['part-00000.parquet', 'part-00001.parquet'\],"
        r" events/date=2020-01-01/key has \['part-00000.parquet'\]",
    ),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_invalid_list_of_partitions_is_refused(kind: str) -> None:
    partitions, message = BAD_LISTS[kind]
    with pytest.raises(ConfigError, match=message):
        snapshot(partitions)


def test_events_without_labels_are_refused_when_the_dataset_has_tasks(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(made, tmp_path / "made"))
    dataset = read_dataset(path)
    listed = tuple(one for one in dataset.snapshot.partitions if one.table != "labels")
    without = dataset.snapshot.model_copy(update={"store": str(dataset.store), "partitions": listed})
    write_snapshot(path, path, dataset.spec, without)
    with pytest.raises(DataError, match="lists events and no labels, for the tasks "):
        read_dataset(path)


def test_valid_list_is_accepted() -> None:
    events = [*day(1, requests=(2,)), *day(2, requests=(5,))]
    sids = [entry(f"{SIDS}/{base}", one.slice, tuple(file.rows for file in one.files))
            for base in ("events", "requests") for one in events if one.table == base]  # fmt: skip
    found = snapshot([*events, *sids, entry("items", "part=00000"), entry("items", "part=00001")])
    assert len(found.partitions) == 12
    assert snapshot([]).partitions == ()


def test_slices_are_named_after_dates() -> None:
    assert date_slice(DAYS[0]) == "date=2020-01-01" and slice_date("date=2020-01-01", "here") == DAYS[0]
    for name in ("2020-01-01", "date=2020-13-01", "date=monday", "part=00001"):
        with pytest.raises(DataError, match="here: must lie in a folder named date=YYYY-MM-DD"):
            slice_date(name, "here")


def test_files_are_found_by_table_and_date(made: Path) -> None:
    dataset = read_dataset(made)
    assert dataset.spec == SPEC and dataset.store == made / "store"
    assert dataset.dates() == DAYS and dataset.dates(*SPEC.test) == DAYS[2:]
    assert [file.rows for file in dataset.files("events")] == [9, 9, 9]
    assert [file.rows for file in dataset.files("requests", DAYS[1], DAYS[1])] == [3]
    assert [file.path.parent.parent.name for file in dataset.files("labels", last=DAYS[1])] == [
        "date=2020-01-01", "date=2020-01-02",
    ]  # fmt: skip
    assert [file.rows for file in dataset.content_files("item")] == [3, 3]
    assert sorted(entry.table for entry in dataset.on_date(DAYS[0])) == ["events", "labels", "requests"]
    assert all(file.path.is_file() for name in ("items", "events") for file in dataset.files(name))
    assert dataset.files("events", date(2021, 1, 1)) == () and dataset.dates(date(2021, 1, 1)) == []
    with pytest.raises(DataError, match="the snapshot lists no partition of users"):
        dataset.content_files("user")
    with pytest.raises(DataError, match="items/part=00000/.*: must lie in a folder named date"):
        dataset.files("items", DAYS[0], DAYS[1])


def test_snapshot_can_be_copied_with_its_store(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "deep" / "copy")
    moved = read_dataset(tmp_path / "deep" / "copy")
    moved.verify(ALONE, moved.snapshot.partitions)
    assert moved.store == tmp_path / "deep" / "copy" / "store"


def test_path_of_the_store_is_relative_to_the_final_place(tmp_path: Path) -> None:
    staging, target = tmp_path / ".out.tmp", tmp_path / "runs" / "out"
    staging.mkdir()
    end = datetime(2020, 1, 3)
    write_snapshot(staging, target, SPEC, snapshot([], store=str(tmp_path / "store"), as_of=end))
    assert json.loads((staging / SNAPSHOT_FILE).read_text())["store"] == "../../store"
    target.parent.mkdir()
    staging.rename(target)
    assert read_dataset(target).store == tmp_path / "store" and read_dataset(target).snapshot.as_of == end


def test_sid_set_names_its_tables() -> None:
    assert SidSet(generation="abc", spec={}, columns={}).table("text", "events") == f"{SIDS}/events"


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        values = json.loads((out / SNAPSHOT_FILE).read_text())
        change(values)
        (out / SNAPSHOT_FILE).write_text(json.dumps(values))

    return damage


def events_list(out: Path) -> Path:
    (digest,) = json.loads((out / SNAPSHOT_FILE).read_text())["lists"]["events"]
    return list_file(out / "store", digest)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no snapshot": (lambda out: (out / SNAPSHOT_FILE).unlink(), r"snapshot\.json: cannot be read as JSON"),
    "half a snapshot": (
        lambda out: (out / SNAPSHOT_FILE).write_text((out / SNAPSHOT_FILE).read_text()[:-90]),
        r"snapshot\.json: cannot be read as JSON",
    ),
    "no description": (lambda out: (out / "dataset.json").unlink(), r"dataset\.json: cannot be read as JSON"),
    "another format": (
        rewritten(lambda values: values.update(format="sidestack-snapshot/2")), r"snapshot\.json\.format: .*snapshot/3"
    ),
    "an unknown key": (rewritten(lambda values: values.update(extra=1)), r"snapshot\.json\.extra: unknown key"),
    "a list that is gone": (
        lambda out: events_list(out).unlink(), r"lists/[0-9a-f]{64}\.json: a list of partitions cannot be read: No such"
    ),
    "a list that was altered": (
        lambda out: events_list(out).write_text(events_list(out).read_text() + " "),
        r"lists/[0-9a-f]{64}\.json: a list of partitions is not of the digest in its name",
    ),
    "a list outside of the store": (
        rewritten(lambda values: values["lists"].update(events=["../../outside"])),
        r"snapshot\.json\.lists\.events\.0: must be a SHA-256",
    ),
    "a key twice": (
        lambda out: (out / SNAPSHOT_FILE).write_text('{"store": "a", "store": "b"}'),
        r"snapshot\.json: cannot be read as JSON: key 'store' occurs twice",
    ),
    "a list twice": (
        rewritten(lambda values: values["lists"].update(events=values["lists"]["events"] * 2)),
        r"snapshot\.json.*events/date=2020-01-01 is listed after events/date=2020-01-03: out of order",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_snapshot_is_refused(kind: str, out: Path) -> None:
    damage, message = BAD_FILES[kind]
    damage(out)
    with pytest.raises(SidestackError, match=message):
        read_dataset(out)


def delete(place: Path) -> None:
    shutil.rmtree(place)


def alter(place: Path) -> None:
    file = place / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def truncate(place: Path) -> None:
    file = place / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])


def delete_file(place: Path) -> None:
    (place / "part-00000.parquet").unlink()


def replace_by_another(place: Path) -> None:
    """Replace the partition by another one, which is intact and has a valid manifest."""
    other = next(one for one in place.parents[1].glob("*/*") if one.parent != place.parent)
    shutil.rmtree(place)
    shutil.copytree(other, place)
    verify(place)


DAMAGES = [
    (delete, "labels/date=2020-01-02/.*: not a committed directory"),
    (alter, "labels/date=2020-01-02/.*/part-00000.parquet: SHA-256 .* the file was altered"),
    (truncate, "labels/date=2020-01-02/.*/part-00000.parquet: has .* bytes, .* truncated or altered"),
    (delete_file, "labels/date=2020-01-02/.*/part-00000.parquet: is named in manifest.json but missing"),
    (replace_by_another, "labels/date=2020-01-02/.*: is another partition than .*snapshot.json lists"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_partition_that_differs_from_the_list_is_refused(
    damage: Callable[[Path], None], message: str, out: Path
) -> None:
    dataset = read_dataset(out)
    dataset.verify(ALONE, dataset.snapshot.partitions)
    listed = dataset.partitions("labels", DAYS[1], DAYS[1])[0]
    damage(dataset.store / listed.path)
    with pytest.raises(CommitError, match=message):
        dataset.verify(ALONE, dataset.snapshot.partitions)
    with pytest.raises(CommitError, match=message):
        dataset.verify_partition(listed)
    dataset.verify(ALONE, dataset.partitions("events"))


def verified_on_ranks(world: World, outs: list[Path]) -> list[str]:
    messages = []
    for dataset in map(read_dataset, outs):
        try:
            dataset.verify(world, dataset.snapshot.partitions)
            messages.append("no error")
        except SidestackError as error:
            messages.append(str(error))
    return messages


def test_ranks_share_the_hashing_and_all_raise(made: Path, out: Path) -> None:
    dataset = read_dataset(out)
    alter(dataset.store / dataset.partitions("events")[0].path)
    found = run_distributed(verified_on_ranks, [made, out])
    assert [right for right, _ in found] == ["no error"] * 2
    messages = [wrong for _, wrong in found]
    assert all("part-00000.parquet: SHA-256" in message for message in messages)
    assert sum("failed" in message for message in messages) == 1


def test_entry_is_restored_from_the_partitions_manifest(made: Path) -> None:
    dataset = read_dataset(made)
    for listed in dataset.snapshot.partitions:
        manifest = read_manifest(dataset.store / listed.path)
        assert entry_of(listed.table, listed.slice, listed.path, manifest) == listed
    with pytest.raises(DataError, match="must lie in a folder named date"):
        _ = dataset.partitions("items")[0].date
