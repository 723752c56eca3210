"""The validation window sets the number of epochs: its measurements, the end of the search, and the final training."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tracking import RunLog
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.fit import start_model
from sidestack.ranker.metrics import prediction_metrics
from sidestack.ranker.planner import Traffic
from sidestack.ranker.predict import predict
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.validation import Validation, measure_ne
from tests.datasets import joined, spoil
from tests.distributed import run_distributed
from tests.ranker.dataset import SPEC, write_dataset
from tests.ranker.stage import run_stage_body
from tests.ranker.test_resume import history, kept_checkpoints, predictions, stopping, summary, train_ranker
from tests.ranker.training import config_of

SEARCH: dict[str, Any] = {"epochs": 4, "validation_days": 1, "checkpoint_every": 8, "log_every": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("validation") / "dataset")


def after(*means: float) -> Validation:
    """Return a validation whose two tasks have these means after each epoch."""
    return Validation([], [{"click": mean - 0.1, "conversion": mean + 0.1} for mean in means])


def test_best_epoch_is_the_one_before_the_mean_rises() -> None:
    assert [after(*means).is_over for means in ((0.9,), (0.9, 0.8), (0.9, 0.9), (0.9, 0.8, 0.81))] == [
        False, False, False, True,
    ]  # fmt: skip
    assert (after(0.9).best, after(0.9, 0.8, 0.81).best, after(0.9, 0.91).best, after(0.9, 0.8).best) == (1, 2, 1, 2)


@pytest.mark.parametrize("children", ["given", "entire_space"])
def test_window_is_measured_like_held_out_rows(world: World, dataset: Path, tmp_path: Path, children: str) -> None:
    config = config_of("none", training={"children": children, "eval_batch_size": 200})
    _, held_out = open_splits(read_dataset(dataset), config)
    runner, _ = start_model(held_out.features, config, world, ModelConstants(), Traffic(history=3.0))
    reader = held_out.open(config.training, world, is_training=False)
    found = measure_ne(runner, reader)
    assert runner.sharded.model.training
    predict(runner, reader, config.arm, tmp_path / "predictions", RunLog(None))
    expected = prediction_metrics(tmp_path, tuple(SPEC.tasks))
    assert found == pytest.approx({task: expected[task]["ne"] for task in SPEC.tasks}, rel=1e-6)


def test_search_result_equals_a_training_of_the_chosen_number_of_epochs(
    world: World, dataset: Path, tmp_path: Path
) -> None:
    searched = run_stage_body(world, dataset, tmp_path / "searched", config_of("sid_ngram", training=SEARCH)).out
    budget = summary(searched)["budget"]
    means = Validation(**budget["validation"]).means
    assert budget["epochs"] == means.index(min(means)) + 1 < 4
    assert means[-1] > means[-2] and len(means) == budget["epochs"] + 1
    assert budget["validation"]["steps"] == 24 * len(means)  # three dates of 512 rows, in batches of 64
    assert budget["validation"]["dates"] == ["2024-01-04", "2024-01-04"]
    assert summary(searched)["steps"] == budget["steps"] == 32 * budget["epochs"]
    lines = history(searched)
    assert [row["step"] for row in lines if "search_validation_click_ne" in row] == [
        24 * (n + 1) for n in range(len(means))
    ]
    curve = [row["step"] for row in lines if "search_click_ne" in row]
    assert curve[:5] == [5, 10, 15, 20, 24] and curve[-1] == budget["validation"]["steps"]
    assert [row["step"] for row in lines if "train_click_ne" in row][-1] == budget["steps"]
    named = {"epochs": budget["epochs"], "validation_days": 0}
    written = run_stage_body(world, dataset, tmp_path / "written", config_of("sid_ngram", training=named)).out
    assert predictions(searched).equals(predictions(written))


def test_metrics_of_the_window_and_of_held_out_dates_have_different_names(
    world: World, dataset: Path, tmp_path: Path
) -> None:
    held_out = {"kind": "validation", "validation_days": 1}
    config = config_of("none", training={**SEARCH, "epochs": 1}, holdout=held_out)
    out = run_stage_body(world, dataset, tmp_path / "out", config).out
    of_window = [row for row in history(out) if "search_validation_click_ne" in row]
    of_held_out = [row["validation_click_ne"] for row in history(out) if "validation_click_ne" in row]
    assert len(of_window) == len(summary(out)["budget"]["validation"]["ne"]) > 0
    assert of_held_out == [summary(out)["tasks"]["click"]["ne"]]


def test_a_share_of_the_steps_ends_within_an_epoch_and_predicts_every_row(
    world: World, dataset: Path, tmp_path: Path
) -> None:
    config = config_of("none", training={"epochs": 3, "steps_share": 0.55, "log_every": 20})
    out = run_stage_body(world, dataset, tmp_path / "out", config).out
    assert summary(out)["steps"] == summary(out)["budget"]["steps"] == 53  # of 96
    assert [row["step"] for row in history(out) if "train_click_ne" in row] == [20, 40, 53]
    assert predictions(out)["row"].to_pylist() == list(range(2 * 512))
    events = joined(dataset, ["click"], *SPEC.test)
    assert predictions(out)["click"].to_pylist() == events["click"].to_pylist()


def test_a_window_of_all_dates_is_refused_before_the_training(world: World, dataset: Path, tmp_path: Path) -> None:
    config = config_of("none", training={**SEARCH, "validation_days": 4})
    with pytest.raises(ConfigError, match=r"ranker\.training\.validation_days=4: training is 2024-01-01 to"):
        run_stage_body(world, dataset, tmp_path / "out", config)
    assert not (tmp_path / "out/history.jsonl").exists()


def test_window_without_both_labels_is_refused(world: World, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=64)
    none = pa.table({task: pa.array(np.zeros(64, np.int8)) for task in SPEC.tasks})
    spoil(path, "labels", SPEC.train[1], lambda labels: none.cast(labels.schema))
    with pytest.raises(DataError, match="no task has both labels in the validation window"):
        run_stage_body(world, path, tmp_path / "out", config_of("none", training={**SEARCH, "batch_size": 32}))


def stopped_in_both(world: World, dataset: Path, folder: Path) -> list[list[str]]:
    """Stop a training in its search, then in its final training, and finish it; train another without a stop.

    Return the checkpoints after each of the two stops.
    """
    found = []
    for total in (96, 64):  # four epochs of 24 steps, and two of 32
        with stopping(total):
            train_ranker(world, dataset, folder / "resumed", **SEARCH)
        assert not (folder / "resumed").exists()
        found.append(kept_checkpoints(folder / "resumed"))
    for name in ("resumed", "whole"):
        train_ranker(world, dataset, folder / name, **SEARCH)
    return found


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_search_and_final_training_resume_bit_for_bit(world: World, dataset: Path, tmp_path: Path, ranks: int) -> None:
    if ranks == 1:
        checkpoints = stopped_in_both(world, dataset, tmp_path)
    else:
        checkpoints, *_ = run_distributed(stopped_in_both, dataset, tmp_path, world_size=ranks)
    steps = summary(tmp_path / "whole")["budget"]["validation"]["steps"]
    assert checkpoints == [[f"step-{before + step:012d}" for step in (32, 40)] for before in (0, steps)]
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    assert history(resumed) == history(whole)
    assert predictions(resumed).equals(predictions(whole))
    assert summary(resumed)["resumed_from_step"] == 40
    validation = summary(resumed)["budget"]["validation"]
    assert validation["resumed_from_step"] == 40
    assert validation["ne"] == summary(whole)["budget"]["validation"]["ne"]
    assert list(tmp_path.glob("*.checkpoint")) == []
