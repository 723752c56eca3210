"""Labels of a user's own tables: in separate files, and their follow-up."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.snapshot import read_dataset
from tests.datasets import joined
from tests.pipelines.prepare.growing import (
    day_at,
    day_file,
    day_rows,
    labels_apart,
    masked,
    read,
    rewrite,
    tables_config,
    with_value,
)
from tests.pipelines.prepare.running import run_prepare
from tests.pipelines.prepare.tables.folder import EVENTS, assert_refused, change_description, rows_of


@pytest.mark.parametrize("requests", ["request_id", "user_time", "none"])
def test_labels_may_be_in_separate_files(requests: str, own: Path) -> None:
    run_prepare(ALONE, tables_config(own, requests=requests), own.parent / "within" / "out")
    labels_apart(own, day_at(1))
    run_prepare(ALONE, tables_config(own, requests=requests), own.parent / "apart" / "out")
    within, apart = (rows_of(own.parent / name / "out") for name in ("within", "apart"))
    assert apart.equals(within)


def test_labels_that_do_not_match_their_events_are_refused(own: Path) -> None:
    labels = day_file(own, day_at(1), "labels")
    both = read(own / EVENTS)
    labels_apart(own, day_at(1))
    whole = read(labels)
    rewrite(labels, whole.slice(0, 49))
    assert_refused(
        own, rf"{EVENTS}, row group 2: has more rows than the labels of 2024-01-02: they must be row-aligned"
    )
    rewrite(labels, pa.concat_tables([whole, whole.slice(0, 1)]))
    assert_refused(own, "labels/date=2024-01-02: holds 51 rows for 50 events: they must be row-aligned")
    rewrite(labels, with_value("click", 3, 2)(whole))
    assert_refused(own, rf"{labels}, row group 0: column 'click': label 2 is not 0 or 1")
    rewrite(labels, whole.drop_columns(["conversion"]))
    assert_refused(own, rf"{labels}: column 'conversion' is missing")
    rewrite(labels, whole)
    rewrite(own / EVENTS, both)
    assert_refused(own, rf"{EVENTS}, row group 0: column 'click': must not be here, as the labels of 2024-01-02 lie")
    labels.parent.rename(labels.parent.with_name("date=2024-02-01"))
    assert_refused(own, "labels/date=2024-02-01: there are no events of this date")


def test_labels_of_another_writer_may_be_declared_not_null(own: Path, prepared: Path) -> None:
    labels_apart(own, day_at(1))
    file = day_file(own, day_at(1), "labels")
    rows = read(file)
    rewrite(file, pa.table(rows.columns, schema=pa.schema([one.with_nullable(False) for one in rows.schema])))
    run_prepare(ALONE, tables_config(own), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))


def test_labels_are_null_until_their_followup_is_over(good: Path, own: Path) -> None:
    """Compare with a plain loop: a label is known if its follow-up ended before the snapshot's end."""
    followup = {"click": 0.25, "conversion": 1.5}
    config = tables_config(own, followup_days=followup, test_days=1, as_of=day_at(4))
    run_prepare(ALONE, config, own.parent / "out")
    found = rows_of(own.parent / "out")
    whole = pa.concat_tables([day_rows(day_at(number)) for number in range(4)])
    end = np.datetime64(day_at(4), "us")
    for task, days in followup.items():
        span = np.timedelta64(int(days * 86_400_000_000), "us")
        is_known = [bool(np.datetime64(at, "us") + span < end) for at in whole["event_time"].to_pylist()]
        assert 0 < sum(is_known) < 200
        assert found[task].combine_chunks().equals(masked(whole[task], is_known))
    assert read_dataset(own.parent / "out").spec.followup_days == followup


def test_followup_is_set_by_the_folder_or_by_the_configuration(own: Path) -> None:
    change_description(own / EVENTS, followup_days={"click": 0.25, "conversion": 3})
    run_prepare(ALONE, tables_config(own, as_of=day_at(4), test_days=1), own.parent / "said")
    settings = {"followup_days": {"conversion": 1}, "as_of": day_at(4), "test_days": 1}
    run_prepare(ALONE, tables_config(own, **settings), own.parent / "out")
    of_folder, laid_over = (read_dataset(own.parent / name).spec.followup_days for name in ("said", "out"))
    assert (of_folder, laid_over) == ({"click": 0.25, "conversion": 3}, {"click": 0.25, "conversion": 1})
    known = [len(rows_of(own.parent / name)["conversion"].drop_null()) for name in ("said", "out")]
    assert known == [50, 150]


def test_followup_of_an_unknown_task_is_refused(own: Path) -> None:
    assert_refused(
        own, "prepare.source.followup_days.buy: is no task; tasks are click, conversion", followup_days={"buy": 3}
    )


def test_labels_are_made_again_when_the_followup_changes(own: Path) -> None:
    """Two follow-ups of different dates that end at the same moment are not confused."""
    outs = [own.parent / f"out{days}" for days in (1, 2)]
    for days, out in zip((1, 2), outs, strict=True):
        values = tables_config(own, followup_days={"conversion": days}, as_of=day_at(4), test_days=1)
        run_prepare(ALONE, values, out)
    known = [
        [joined(out, ["conversion"], day_at(n), day_at(n))["conversion"].null_count for n in range(4)] for out in outs
    ]
    assert known == [[0, 0, 0, 50], [0, 0, 50, 50]]


def test_only_labels_are_made_again_when_the_parent_of_a_task_changes(own: Path) -> None:
    """The counts of a task depend on its parent."""
    first, second = own.parent / "first", own.parent / "second"
    run_prepare(ALONE, tables_config(own), first)
    change_description(own / EVENTS, tasks={"click": {}, "conversion": {}})
    run_prepare(ALONE, tables_config(own), second)
    clicks = day_rows(day_at(1))["click"].to_pylist().count(1)
    (before,), (after,) = (
        [entry for entry in read_dataset(out).partitions("labels") if entry.slice == "date=2024-01-02"]
        for out in (first, second)
    )
    assert before.facts["judged_conversion"] == clicks and after.facts["judged_conversion"] == 50
    for table in ("requests", "events"):
        assert read_dataset(first).partitions(table) == read_dataset(second).partitions(table)
