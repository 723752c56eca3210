"""The mean of the network's weights over the last steps, and tables that begin each epoch anew."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sidestack.infra.distributed import World
from sidestack.infra.state import SHARED_FILE
from sidestack.ranker.averaging import WeightAverage
from sidestack.ranker.bundle import FOLDER
from sidestack.ranker.sharding import ShardedRanker
from tests.ranker.dataset import write_dataset
from tests.ranker.test_resume import train_ranker

WEIGHT = "body.interaction.over_arch.0.weight"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("averaging") / "dataset", rows_a_day=128)


def moved(average: WeightAverage, weight: Tensor, values: list[float]) -> None:
    """Take a step for each value of a weight."""
    for value in values:
        weight.fill_(value)
        average.add()


def test_the_mean_of_all_steps_takes_the_weights_place() -> None:
    weight = torch.zeros(2)
    average = WeightAverage({"w": weight})
    average.apply()
    assert weight.tolist() == [0, 0] and average.state() == {}
    moved(average, weight, [1, 2, 6])
    assert weight.tolist() == [6, 6]
    average.apply()
    assert weight.tolist() == [3, 3]


def test_a_mean_that_was_kept_goes_on() -> None:
    weight, later = torch.zeros(2), torch.zeros(2)
    average, resumed = WeightAverage({"w": weight}), WeightAverage({"w": later})
    moved(average, weight, [1, 2])
    resumed.load_state({**average.state(), "other": torch.ones(1)})
    moved(average, weight, [100])  # the kept mean is a copy
    moved(resumed, later, [6])
    resumed.apply()
    assert later.tolist() == [3, 3]


def test_the_trained_ranker_has_the_means_of_the_last_steps(
    world: World, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    kept = WeightAverage.add

    def add(average: WeightAverage) -> None:
        seen.append(average._weights[WEIGHT].detach().clone())
        kept(average)

    monkeypatch.setattr(WeightAverage, "add", add)
    for name, share in (("last", 0.0), ("mean", 0.25)):
        train_ranker(world, dataset, tmp_path / name, epochs=2, average_share=share)  # 16 steps
    last, mean = (load_file(tmp_path / name / FOLDER / SHARED_FILE)[f"model.{WEIGHT}"] for name in ("last", "mean"))
    assert len(seen) == 4
    assert torch.equal(seen[-1], last)
    torch.testing.assert_close(torch.stack(seen).mean(0), mean, rtol=1e-6, atol=1e-7)
    assert not torch.equal(last, mean)


@pytest.mark.parametrize(("epochs", "restarts"), [(1, 0), (3, 2)])
def test_tables_restart_before_each_epoch_but_the_first(
    world: World,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    epochs: int,
    restarts: int,
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(ShardedRanker, "restart_tables", lambda _, seed: seeds.append(seed))
    train_ranker(world, dataset, tmp_path / "kept", epochs=epochs)
    assert seeds == []
    train_ranker(world, dataset, tmp_path / "restarted", epochs=epochs, restart_tables=True, seed=3)
    assert seeds == [3] * restarts
    said = "restart_tables=true changes nothing: there is one epoch" in capsys.readouterr().err
    assert said == (epochs == 1)
