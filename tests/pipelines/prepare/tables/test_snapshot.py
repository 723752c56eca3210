"""The snapshot of a user's own tables: ranks, splits, dates and parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE, World
from sidestack.infra.errors import SidestackError
from sidestack.infra.manifest import verify
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content
from tests.distributed import run_distributed
from tests.pipelines.prepare.growing import (
    add_items,
    day_at,
    day_rows,
    read,
    rewrite,
    tables_config,
    with_value,
    without_counts,
)
from tests.pipelines.prepare.running import leftovers, made_of, run_prepare
from tests.pipelines.prepare.tables.folder import EVENTS, ITEMS, assert_refused, change_rows, rows_of


def test_valid_tables_become_the_snapshot(good: Path, prepared: Path) -> None:
    """The row groups of the user's files do not matter."""
    verify(prepared)
    dataset = read_dataset(prepared)
    dataset.verify(ALONE, dataset.snapshot.partitions)
    assert dataset.spec.model_dump() == json.loads((good / "dataset.json").read_text()) | {
        "train": dataset.spec.train, "test": dataset.spec.test,
        **{name: tuple(getattr(dataset.spec, name)) for name in ("dense", "request_dense")},
    }  # fmt: skip
    assert dataset.dates() == [day_at(number) for number in range(4)]
    expected = pa.concat_tables([day_rows(day_at(number)) for number in range(4)])
    assert rows_of(prepared).select(expected.column_names).equals(expected.combine_chunks())
    requests = content(dataset, "requests")
    assert requests["request_id"].to_pylist() == expected["request_id"].unique().to_pylist()
    assert content(dataset, "items")["item_id"].to_pylist() == list(range(60))


def on_ranks(world: World, right: Path, wrong: Path, out: Path) -> str:
    run_prepare(world, tables_config(right), out / "right" / "out")
    try:
        run_prepare(world, tables_config(wrong), out / "wrong" / "out")
    except SidestackError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_make_the_same_bytes_and_fail_together(
    ranks: int, own: Path, good: Path, prepared: Path, tmp_path: Path
) -> None:
    change_rows(own, EVENTS, with_value("click", 30, 2))
    messages = run_distributed(on_ranks, good, own, tmp_path, world_size=ranks)
    assert all("label 2 is not 0 or 1" in message for message in messages)
    assert sum("failed" in message for message in messages) == ranks - 1
    assert not (tmp_path / "wrong" / "out").exists() and leftovers(tmp_path) == []
    assert made_of(tmp_path / "right" / "out") == made_of(prepared)


def test_splits_may_be_the_newest_dates(own: Path) -> None:
    splits: list[tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = [
        ({"test_days": 1}, (0, 2), (3, 3)),
        ({"test_days": 2, "train_days": 1}, (1, 1), (2, 3)),
        ({"test_days": 1, "as_of": day_at(3)}, (0, 1), (2, 2)),
    ]
    for number, (settings, train, test) in enumerate(splits):
        run_prepare(ALONE, tables_config(own, **settings), own.parent / f"out{number}")
        spec = read_dataset(own.parent / f"out{number}").spec
        assert (spec.train, spec.test) == ((day_at(train[0]), day_at(train[1])), (day_at(test[0]), day_at(test[1])))
    assert_refused(own, "4 dates leave none to train on beside test_days=4", test_days=4)


def test_a_date_without_rows_is_an_empty_partition(own: Path) -> None:
    rewrite(own / EVENTS, read(own / EVENTS).slice(0, 0))
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    dataset = read_dataset(own.parent / "out")
    assert [file.rows for file in dataset.files("events")] == [50, 0, 50, 50]
    assert rows_of(own.parent / "out").num_rows == 150


def test_empty_files_are_not_taken_for_duplicates(own: Path, prepared: Path) -> None:
    """Some writers leave empty files, which all have the same footer."""
    empty = read(own / EVENTS).slice(0, 0)
    for name in ("empty-0.parquet", "empty-1.parquet"):
        rewrite((own / EVENTS).with_name(name), empty)
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))


def test_later_part_revises_rows_and_continues_the_numbering(own: Path) -> None:
    items = read(own / ITEMS)
    without_counts(own)
    rewrite(own / ITEMS, items.slice(0, 48))
    revised = with_value("text", 0, "revised")(pa.concat_tables([items.slice(5, 1), items.slice(48, 12)]))
    rewrite(own / "items" / "part-00001.parquet", revised)
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    dataset = read_dataset(own.parent / "out")
    assert dataset.spec.num_items == 60
    assert [(entry.facts["first"], entry.facts["new"]) for entry in dataset.partitions("items")] == [(0, 48), (48, 12)]
    assert content(dataset, "items")["item_id"].to_pylist() == [*range(48), 5, *range(48, 60)]


def test_duplicate_part_adds_nothing_and_part_out_of_order_is_refused(own: Path) -> None:
    shutil.copy(own / ITEMS, own / "items" / "part-00001.parquet")
    run_prepare(ALONE, tables_config(own), own.parent / "twice")
    dataset = read_dataset(own.parent / "twice")
    assert dataset.spec.num_items == 60 and [one.facts["new"] for one in dataset.partitions("items")] == [60, 0]
    (own / "items" / "part-00001.parquet").unlink()
    add_items(own, 0, 48, "part-00001.parquet")
    add_items(own, 48, 60, "part-00000.parquet")
    assert_refused(
        own, f"{own / ITEMS}: column 'item_id': new ids must continue from 0 without a gap; 0 is expected, 48 is there"
    )


def test_parts_are_known_from_their_date_on(own: Path) -> None:
    without_counts(own)
    add_items(own, 0, 48)
    add_items(own, 48, 60, "date=2024-01-03/part-00000.parquet")
    counts = {}
    for number in (2, 3, 4):
        run_prepare(ALONE, tables_config(own, as_of=day_at(number)), own.parent / f"out{number}")
        dataset = read_dataset(own.parent / f"out{number}")
        counts[number] = (len(dataset.partitions("items")), dataset.spec.num_items)
    assert counts == {2: (1, 48), 3: (2, 60), 4: (2, 60)}


def test_event_with_a_later_item_is_refused_even_if_its_partition_exists(own: Path) -> None:
    """The date's partition is valid for a later snapshot, but the earlier snapshot does not know the item."""
    without_counts(own)
    add_items(own, 0, 48)
    add_items(own, 48, 60, "date=2024-01-04/part-00000.parquet")
    run_prepare(ALONE, tables_config(own), own.parent / "later")
    assert_refused(
        own, r"(events|requests)/date=2024-01-03: item_id \d+ is outside the table \[0, 48\)", as_of=day_at(3)
    )


def test_end_before_the_log_is_refused(own: Path) -> None:
    assert_refused(own, "events: holds no Parquet file in a folder date=YYYY-MM-DD before 2024-01-01", as_of=day_at(0))
