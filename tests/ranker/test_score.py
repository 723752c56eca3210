"""Stage `score`: the probabilities of every row equal those of the training, and an interrupted run resumes."""

import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.infra.checkpoint import Checkpoints
from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, DataError, SidestackError, SpecError
from sidestack.infra.manifest import verify
from sidestack.infra.stage import StageRun, with_inputs
from sidestack.infra.tracking import RunLog
from sidestack.ranker.predict import predict
from sidestack.ranker.predictions import FOLDER as PREDICTIONS
from sidestack.ranker.score import score
from sidestack.ranker.score_config import ScoreConfig
from tests.distributed import run_distributed
from tests.ranker.dataset import SID, SPEC, all_days, write_dataset
from tests.ranker.test_resume import predictions, summary, train_ranker

ROWS = 100
"""Rows per date."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("score") / "dataset", rows_a_day=ROWS)


@pytest.fixture(scope="module")
def model(world: World, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "side"
    train_ranker(world, dataset, out, "side", epochs=1)
    return out


def run_score(world: World, model: Path, dataset: Path, out: Path, **config: Any) -> None:
    """Run the stage's body and commit its output, as its main program does."""
    settings = ScoreConfig(**{"part_rows": 2 * ROWS, **config})
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, "score", {"inputs": str(model)}, settings)
    with committing(out, world, stage="score") as staging:
        log = RunLog.open(world.rank, "score", staging, {}, {}, "", None)
        score(StageRun(settings, {"model": model, "dataset": dataset}, staging, world, log, {}, checkpoints))
    checkpoints.remove()


def on_test_dates(scored: pa.Table) -> pa.Table:
    """Return the rows of the test dates, numbered as the training numbered them."""
    first = scored.num_rows - 2 * ROWS
    return scored.slice(first).set_column(0, "row", pa.array(np.arange(2 * ROWS)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_probabilities_equal_those_of_the_training(model: Path, dataset: Path, tmp_path: Path, world_size: int) -> None:
    run_distributed(run_score, model, dataset, tmp_path / "out", world_size=world_size)
    verify(tmp_path / "out")
    found, expected = predictions(tmp_path / "out"), predictions(model)
    assert found["row"].to_pylist() == list(range(len(all_days()) * ROWS))
    again = on_test_dates(found)
    for task in SPEC.tasks:
        np.testing.assert_allclose(again[f"p_{task}"], expected[f"p_{task}"], atol=1e-6)
    labels = [name for name in expected.column_names if not name.startswith("p_")]
    assert again.select(labels).to_pylist() == expected.select(labels).to_pylist()
    assert not (tmp_path / "out.checkpoint").exists()


def test_interrupted_run_resumes_with_the_unfinished_part(
    world: World, model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def breaking(*arguments: Any) -> float:
        if len(done) == 2:
            raise OSError("the disk is gone")
        done.append(arguments[2])
        return predict(*arguments)

    monkeypatch.setattr("sidestack.ranker.score.predict", breaking)
    with pytest.raises(OSError, match="the disk is gone"):
        run_score(world, model, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done.clear()
    run_score(world, model, dataset, tmp_path / "out")
    assert done == ["side, 2024-01-05 to 2024-01-06"]
    assert summary(tmp_path / "out")["scored_before"] == 4 * ROWS
    done.clear()
    monkeypatch.setattr("sidestack.ranker.score.predict", predict)
    run_score(world, model, dataset, tmp_path / "whole")
    assert predictions(tmp_path / "out").equals(predictions(tmp_path / "whole"))


def test_parts_of_another_model_are_scored_again(
    world: World, model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_ranker(world, dataset, tmp_path / "other", "side", epochs=1, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr("sidestack.ranker.score._collect", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            run_score(world, model, dataset, tmp_path / "out")
    run_score(world, tmp_path / "other", dataset, tmp_path / "out")
    assert summary(tmp_path / "out")["scored_before"] == 0
    found = on_test_dates(predictions(tmp_path / "out"))["p_click"]
    np.testing.assert_allclose(found, predictions(tmp_path / "other")["p_click"], atol=1e-6)


def test_dates_can_be_chosen(world: World, model: Path, dataset: Path, tmp_path: Path) -> None:
    run_score(world, model, dataset, tmp_path / "out", dates=SPEC.test)
    np.testing.assert_allclose(predictions(tmp_path / "out")["p_click"], predictions(model)["p_click"], atol=1e-6)
    with pytest.raises(DataError, match="no rows from 2025-01-01"):
        run_score(world, model, dataset, tmp_path / "none", dates=(date(2025, 1, 1), date(2025, 1, 2)))


def other_sids(folder: Path) -> Path:
    return write_dataset(folder / "other", SID.model_copy(update={"fingerprint": "ba" * 32}), rows_a_day=ROWS)


def without_sids(folder: Path) -> Path:
    return write_dataset(folder / "bare", None, rows_a_day=ROWS)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (other_sids, SpecError, "SIDs 'sid' have fingerprint ba"),
        (without_sids, SpecError, "has no SIDs 'sid', which the ranker takes"),
    ],
)
def test_snapshot_with_other_sids_or_without_sids_is_refused(
    world: World, model: Path, tmp_path: Path, other: Any, error: type[SidestackError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_score(world, model, other(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_model_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (file, *_) = (tmp_path / "model" / "model" / "shards").iterdir()
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CommitError, match="altered"):
        verify(tmp_path / "model")  # what the stage's main program does first, on every input


def test_model_and_dataset_options_become_inputs() -> None:
    words = ["--model", "a", "--out", "c", "--dataset=b", "--set", "score.part_rows=3"]
    found = with_inputs(words, ("model", "dataset"))
    assert found == ["--input", "model=a", "--out", "c", "--input", "dataset=b", "--set", "score.part_rows=3"]


def test_files_are_named_by_part_and_rank(world: World, model: Path, dataset: Path, tmp_path: Path) -> None:
    run_score(world, model, dataset, tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out" / PREDICTIONS).iterdir())
    assert files == [f"part-0000{part}-00000.parquet" for part in range(3)]
    assert [pq.read_metadata(tmp_path / "out" / PREDICTIONS / file).num_rows for file in files] == [2 * ROWS] * 3
