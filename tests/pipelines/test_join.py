"""The joined copy for other programs: complete rows, each once, from verified partitions."""

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest

from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.impressions import all_columns
from sidestack.infra.manifest import verify
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.join import FOLDER, join, main
from tests.datasets import joined, write_snapshot_of
from tests.infra.made_up import DAYS, SPEC, requests, table

SIZES = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def rows(day: date) -> pa.Table:
        content = table(requests(day, [] if day == DAYS[1] else SIZES))
        return content.append_column("app", pa.array(range(content.num_rows), pa.int64()))

    out = tmp_path_factory.mktemp("made") / "out"
    return write_snapshot_of(out, SPEC, days={day: rows(day) for day in DAYS}, row_group_rows=4)


def read(out: Path) -> pa.Table:
    """Read the output as other programs do: a Hive-partitioned folder."""
    found = pyarrow.dataset.dataset(out / FOLDER, partitioning="hive").to_table()
    return found.sort_by([("request_id", "ascending")])


def test_the_copy_has_all_rows_and_columns(made: Path, tmp_path: Path) -> None:
    main(["--dataset", str(made), "--out", str(tmp_path / "out")])
    verify(tmp_path / "out")
    found, columns = read(tmp_path / "out"), all_columns(read_dataset(made))
    assert found.column_names == [*columns, "date"]
    assert found.select(columns).to_pylist() == joined(made, columns).to_pylist()
    assert [str(day) for day in found["date"].to_pylist()] == [str(at.date()) for at in found["event_time"].to_pylist()]
    assert sorted(path.name for path in (tmp_path / "out" / FOLDER).iterdir()) == ["date=2020-01-01", "date=2020-01-03"]


def test_dates_and_columns_may_be_chosen(made: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(made), "--out", str(tmp_path / "out"), "--from", "2020-01-02", "--to", "2020-01-03"]
    main([*arguments, "--columns", "request_id", "app", "buy", "hour"])
    found = read(tmp_path / "out")
    assert found.column_names == ["request_id", "app", "buy", "hour", "date"]
    assert found["app"].to_pylist() == list(range(sum(SIZES)))
    assert {str(day) for day in found["date"].to_pylist()} == {"2020-01-03"}


def test_existing_directory_is_not_overwritten(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(SystemExit, match="1"):
        main(["--dataset", str(made), "--out", str(tmp_path / "out")])
    assert "out: exists and is not a directory of ours" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]
    join(read_dataset(made), tmp_path / "second", date.min, date.max)
    with pytest.raises(CommitError, match="is committed already and is never overwritten"):
        join(read_dataset(made), tmp_path / "second", date.min, date.max)


def alter(place: Path) -> None:
    file = place / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("spoil", "message"), [(alter, "the file was altered"), (shutil.rmtree, "not a committed directory")]
)
@pytest.mark.parametrize("name", ["requests", "events", "labels"])
def test_altered_partitions_are_refused_without_leftovers(
    name: str, spoil: Callable[[Path], None], message: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "copy")
    dataset = read_dataset(tmp_path / "copy")
    spoil(dataset.store / dataset.partitions(name)[2].path)
    with pytest.raises(CommitError, match=f"{name}/date=2020-01-03/.*{message}"):
        join(dataset, tmp_path / "out", date.min, date.max)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    join(dataset, tmp_path / "earlier", date.min, DAYS[1])  # the altered partition is of a later date


def test_wrong_arguments_are_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = read_dataset(made)
    with pytest.raises(DataError, match="the snapshot has no events from 2021-01-01 to"):
        join(dataset, tmp_path / "out", date(2021, 1, 1), date.max)
    with pytest.raises(DataError, match="events/date=2020-01-01/.*: column 'bid' is missing"):
        join(dataset, tmp_path / "out", date.min, date.max, ["bid"])
    with pytest.raises(SystemExit, match="1"):
        main(["--dataset", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "dataset.json: cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
