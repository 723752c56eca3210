"""The ranker's stage refuses what it cannot train on or write, on every rank."""

import errno
from pathlib import Path

import pytest

import sidestack.ranker.predict
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, DataError, StageError, TrainingError
from sidestack.infra.parquet_writer import TableWriter
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.loss_check import NonFiniteLossError
from sidestack.ranker.predict import prediction_table
from tests.datasets import joined, write_snapshot_of
from tests.distributed import run_distributed
from tests.ranker.dataset import SIDS, SPEC, all_days, write_dataset
from tests.ranker.stage import ROWS_A_DAY, run_stage_body
from tests.ranker.training import config_of, not_a_number, run_steps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("refusals") / "dataset", rows_a_day=ROWS_A_DAY)


def test_a_held_out_split_without_a_row_is_refused_before_the_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_dataset(tmp_path / "plain", rows_a_day=64)
    given = {day: joined(plain, None, day, day).slice(0, 0 if day >= SPEC.test[0] else 64) for day in all_days()}
    path = write_snapshot_of(tmp_path / "dataset", SPEC, [], [], given, SIDS.values())
    monkeypatch.setattr("sidestack.ranker.train.fit", lambda *_: pytest.fail("has trained"))
    with pytest.raises(DataError, match="0 rows in 8 lanes: not one batch of 64"):
        run_stage_body(world, path, tmp_path / "out", config_of("none"))


def test_a_split_without_a_date_is_refused_before_the_training(world: World, tmp_path: Path) -> None:
    plain = write_dataset(tmp_path / "plain", rows_a_day=64)
    given = {day: joined(plain, None, day, day) for day in all_days() if day < SPEC.test[0]}
    path = write_snapshot_of(tmp_path / "dataset", SPEC, [], [], given, SIDS.values())
    with pytest.raises(DataError, match="the snapshot has no events from 2024-01-05 to 2024-01-06"):
        run_stage_body(world, path, tmp_path / "out", config_of("none"))


class FullDisk(TableWriter):
    """A writer whose disk has no space for the end of the file."""

    def _close(self) -> None:
        raise OSError(errno.ENOSPC, "no space")


def failed_predictions(world: World, dataset: Path, out: Path) -> list[str]:
    """Make the last rank leave out rows, then make its disk full, and return both errors."""
    errors = []
    faults = {"prediction_table": lambda *args: prediction_table(*args).slice(1), "TableWriter": FullDisk}
    for name, wrong in faults.items():
        whole = getattr(sidestack.ranker.predict, name)
        setattr(sidestack.ranker.predict, name, wrong if world.rank == world.size - 1 else whole)
        try:
            run_stage_body(world, dataset, out / name, config_of("none"))
        except (DataError, StageError, TrainingError) as error:
            errors.append(str(error))
        finally:
            setattr(sidestack.ranker.predict, name, whole)
    return errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_that_lack_rows_or_cannot_be_written_fail_on_every_rank(
    dataset: Path, tmp_path: Path, ranks: int
) -> None:
    errors = run_distributed(failed_predictions, dataset, tmp_path / "out", world_size=ranks)
    batches = 2 * ROWS_A_DAY // 64 + 1  # each batch lacks one row
    rule = f"predictions: {2 * ROWS_A_DAY - batches} rows were predicted, the held-out dates have {2 * ROWS_A_DAY}"
    full = f"predictions/part-0000{ranks - 1}.parquet: cannot be written: no space left on the disk"
    assert [(lacking.endswith(rule), writing.endswith(full)) for lacking, writing in errors] == [(True, True)] * ranks


def refusal_of_altered(world: World, altered: Path, out: Path) -> list[str]:
    """Train an arm that reads the SIDs, one that reads the items and one that reads neither; return the results."""
    found = []
    for arm in ("side", "dense", "none"):
        try:
            run_stage_body(world, altered, out / arm, config_of(arm))
            found.append("trained")
        except (CommitError, StageError) as error:
            found.append(str(error))
        steps = (out / arm / "history.jsonl").exists() and (out / arm / "history.jsonl").read_text()
        found[-1] += ", after steps" if steps else ""
    return found


def flip_last_byte(file: Path) -> None:
    """Alter the content of a committed file, but not its size."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("ranks", [1, 2])
def test_altered_partition_stops_only_the_arms_that_read_it_and_on_every_rank(tmp_path: Path, ranks: int) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=64)
    dataset = read_dataset(path)
    (file,) = dataset.files(dataset.snapshot.sids["sid"].table("sid", "requests"), SPEC.test[1], SPEC.test[1])
    (items,) = dataset.files("items")
    for altered in (file.path, items.path):
        flip_last_byte(altered)
    for errors in run_distributed(refusal_of_altered, path, tmp_path / "out", world_size=ranks):
        side, dense, none = errors
        for error, altered in ((side, file.path), (dense, items.path)):
            assert f"{altered}: SHA-256 " in error and "the file was altered" in error
            assert not error.endswith("after steps")
        assert none == "trained, after steps"


def test_non_finite_loss_stops_the_training_and_names_the_rows(
    world: World, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidestack.ranker.blocks.DenseBlock.forward", not_a_number)
    with pytest.raises(NonFiniteLossError, match=r"click nan.*batch 0, this rank's 64 rows are in .*row group 0"):
        run_steps(world, dataset, config_of("none"), 2)
