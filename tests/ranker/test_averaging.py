"""The mean of the network's weights over the last steps, and tables that restart in each epoch."""

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


def take_steps(average: WeightAverage, weight: Tensor, values: list[float]) -> None:
    """Take one step for each value of the weight."""
    for value in values:
        weight.fill_(value)
        average.add()


def test_apply_replaces_the_weight_by_its_mean_over_all_steps() -> None:
    weight = torch.zeros(2)
    average = WeightAverage({"w": weight})
    average.apply()
    assert weight.tolist() == [0, 0] and average.state() == {}
    take_steps(average, weight, [1, 2, 6])
    assert weight.tolist() == [6, 6]
    average.apply()
    assert weight.tolist() == [3, 3]


def test_mean_resumes_from_its_saved_state() -> None:
    weight, later = torch.zeros(2), torch.zeros(2)
    average, resumed = WeightAverage({"w": weight}), WeightAverage({"w": later})
    take_steps(average, weight, [1, 2])
    resumed.load_state({**average.state(), "other": torch.ones(1)})
    take_steps(average, weight, [100])  # the saved mean is a copy
    take_steps(resumed, later, [6])
    resumed.apply()
    assert later.tolist() == [3, 3]


def test_trained_ranker_has_the_mean_weights_of_the_last_steps(
    world: World, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original_add = WeightAverage.add

    def add(average: WeightAverage) -> None:
        seen.append(average._weights[WEIGHT].detach().clone())
        original_add(average)

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
    warned = "restart_tables=true changes nothing: there is one epoch" in capsys.readouterr().err
    assert warned == (epochs == 1)
