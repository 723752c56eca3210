"""Requests of a user's own tables: by column, by user and time, or none."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.distributed import ALONE
from sidestack.infra.impressions import all_columns
from sidestack.infra.snapshot import read_dataset
from tests.datasets import joined
from tests.pipelines.prepare.growing import day_at, day_file, read, rewrite, tables_config, with_column, with_value
from tests.pipelines.prepare.running import run_prepare
from tests.pipelines.prepare.tables.folder import EVENTS, assert_refused, change_rows, rows_of


def test_request_with_separated_rows_in_a_date_is_refused(own: Path) -> None:
    rows = read(own / EVENTS)
    rewrite(own / EVENTS, pa.concat_tables([rows.slice(1), rows.slice(0, 1)]))  # not adjacent
    first = rows["request_id"][0].as_py()
    assert_refused(own, rf"events/date=2024-01-02: column 'request_id': request {first} comes twice")


def test_rows_of_one_request_that_differ_are_refused(own: Path) -> None:
    rows = read(own / EVENTS)
    assert rows["request_id"][0] == rows["request_id"][1]
    change_rows(own, EVENTS, with_value("user_id", 1, (rows["user_id"][1].as_py() + 1) % 20))
    assert_refused(own, r"events/date=2024-01-02: column 'user_id': must be equal in all rows of a request; request")
    rewrite(
        own / EVENTS, with_column("request_id", lambda ids: [ids[0]] * len(ids))(rows)
    )  # all rows are of one request
    assert_refused(
        own, r"events/date=2024-01-02: column '(user_id|event_time)': must be equal in all rows of a request"
    )


def test_requests_of_the_column_are_the_default(good: Path, prepared: Path, own: Path) -> None:
    run_prepare(ALONE, tables_config(own, requests="request_id"), own.parent / "out")
    assert rows_of(own.parent / "out").equals(rows_of(prepared))
    for number in range(4):
        change_rows(own, str(day_file(own, day_at(number)).relative_to(own)), lambda t: t.drop_columns(["request_id"]))
    refused_at = own.parent / "none"
    refused_at.mkdir()
    assert_refused(
        Path(shutil.copytree(own, refused_at / "own")), "column 'request_id' is missing", requests="request_id"
    )
    run_prepare(ALONE, tables_config(own), own.parent / "default")
    dataset = read_dataset(own.parent / "default")
    assert [file.rows for file in dataset.files("requests")] == [50] * 4


@pytest.mark.parametrize("has_ids", [True, False])
def test_every_impression_is_its_own_request_when_requests_is_none(has_ids: bool, own: Path, prepared: Path) -> None:
    if not has_ids:
        for number in range(4):
            change_rows(
                own, str(day_file(own, day_at(number)).relative_to(own)), lambda t: t.drop_columns(["request_id"])
            )
    run_prepare(ALONE, tables_config(own, requests="none"), own.parent / "out")
    rows = rows_of(own.parent / "out")
    assert len(rows["request_id"].unique()) == rows.num_rows == 200
    assert rows.drop_columns(["request_id"]).equals(rows_of(prepared).drop_columns(["request_id"]))


def test_rows_of_one_user_and_time_are_grouped_into_a_request(own: Path, prepared: Path) -> None:
    """Rows are grouped from anywhere in the date; requests are in order of time, and their rows keep their order."""
    order = np.random.default_rng(3).permutation(50)
    rows = read(own / EVENTS).take(pa.array(order))
    rewrite(own / EVENTS, with_column("request_id", lambda ids: range(len(ids)))(rows))
    run_prepare(ALONE, tables_config(own, requests="user_time"), own.parent / "out")
    found = joined(own.parent / "out", all_columns(read_dataset(own.parent / "out")), day_at(1), day_at(1))
    listed = sorted(
        range(50), key=lambda row: (rows["event_time"][row].as_py(), rows["user_id"][row].as_py(), row)
    )  # fmt: skip
    assert found["item_id"].to_pylist() == [rows["item_id"][row].as_py() for row in listed]
    keys = list(zip(found["user_id"].to_pylist(), found["event_time"].to_pylist(), strict=True))
    expected = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    ids = [one - (day_at(1).toordinal() << 32) for one in found["request_id"].to_pylist()]
    assert ids == [expected[key] for key in keys] and len(expected) == 17
