"""Wrong files of a user's own folder are refused with file and rule."""

import shutil
from pathlib import Path

import pytest

from tests.pipelines.prepare.growing import read, rewrite
from tests.pipelines.prepare.tables.folder import EVENTS, ITEMS, assert_refused, change_description, change_rows


def test_wrong_count_in_the_description_is_named(own: Path) -> None:
    change_rows(own, ITEMS, lambda t: t.slice(0, 59))
    assert str(own / "items") in assert_refused(own, r"holds 59 rows, dataset.json says num_items=60")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def rename_day(path: Path) -> None:
    path.parent.rename(path.parent.with_name("day=2024-01-02"))


def no_test_days(path: Path) -> None:
    for folder in path.parents[1].glob("date=2024-01-0[34]"):
        shutil.rmtree(folder)


def empty_test_days(path: Path) -> None:
    for file in path.parents[1].glob("date=2024-01-0[34]/*.parquet"):
        rewrite(file, read(file).slice(0, 0))


BAD_FILES = {
    "truncated": (truncate, r"date=2024-01-02/part-00000.parquet: is no Parquet file: it does not end in a footer"),
    "no bytes": (lambda path: path.write_bytes(b""), r"date=2024-01-02/part-00000.parquet: is no Parquet file"),
    "badly named day": (rename_day, r"day=2024-01-02: must lie in a folder named date=YYYY-MM-DD"),
    "split without files": (no_test_days, r"the test dates, 2024-01-03 to 2024-01-04, have no rows"),
    "split without rows": (empty_test_days, r"the test dates, 2024-01-03 to 2024-01-04, have no rows"),
    "no events": (
        lambda path: shutil.rmtree(path.parents[1]), r"events: holds no Parquet file in a folder date=YYYY-MM-DD"
    ),
    "unknown key": (lambda path: change_description(path, version=2), r"dataset.json.version: unknown key"),
    "no tasks": (lambda path: change_description(path, tasks={}), r"dataset.json: tasks: must name at least one"),
    "task without its parent": (
        lambda path: change_description(path, tasks={"conversion": {"given": "click"}}),
        r"dataset.json.*tasks.conversion.given: 'click' is no task",
    ),
    "tasks in a circle": (
        lambda path: change_description(
            path, tasks={"click": {"given": "conversion"}, "conversion": {"given": "click"}}
        ),
        r"dataset.json.*tasks.click.given: the tasks are given each other in a circle",
    ),
    "no description": (lambda path: (path.parents[2] / "dataset.json").unlink(), r"dataset.json: cannot be read"),
    "no users": (lambda path: shutil.rmtree(path.parents[2] / "users"), r"users: holds no Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_refused(kind: str, own: Path) -> None:
    spoil, message = BAD_FILES[kind]
    spoil(own / EVENTS)
    assert_refused(own, message)


def test_truncated_file_is_refused_when_only_its_bytes_are_hashed(own: Path) -> None:
    truncate(own / EVENTS)
    assert_refused(own, r"date=2024-01-02/part-00000.parquet: cannot be read as Parquet", identify="sha256")


def test_corrupt_bytes_before_the_footer_are_named(own: Path) -> None:
    whole = (own / EVENTS).read_bytes()
    (own / EVENTS).write_bytes(whole[:4] + bytes(200) + whole[204:])
    assert_refused(own, r"date=2024-01-02/part-00000.parquet, row group 0: cannot be decoded")


def test_duplicate_file_on_a_date_is_refused(own: Path) -> None:
    copy = shutil.copy(own / EVENTS, (own / EVENTS).with_name("part-00001.parquet"))
    for kind in ("none", "user_time", "request_id"):
        assert str(own / EVENTS) in assert_refused(own, f"{copy}: is the same file as", requests=kind)


def test_a_file_under_another_date_is_refused(own: Path) -> None:
    shutil.copytree((own / EVENTS).parent, own / "events" / "date=2024-01-05")
    assert_refused(own, r"date=2024-01-05/.*column 'event_time': must lie on 2024-01-05")
