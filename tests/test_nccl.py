"""Stages on two ranks with nccl on GPUs and with gloo on CPUs."""

from pathlib import Path

import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.infra import doctor
from sidestack.infra.distributed import World, sum_over_ranks
from tests.distributed import Backend, on_each_backend, run_distributed
from tests.encoder.fabricated import train_encoder
from tests.encoder.fabricated import write_dataset as write_items
from tests.ranker.dataset import write_dataset
from tests.ranker.training import config_of, run_steps

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_doctor_runs_an_all_reduce_over_nccl() -> None:
    assert doctor._nccl().startswith("nccl: all-reduce over ")


def added_up(world: World) -> tuple[str, list[int]]:
    total = sum_over_ranks(world, torch.full((3,), world.rank + 1, device=world.device))
    return total.device.type, total.tolist()


@on_each_backend()
def test_sum_over_ranks_stays_on_the_tensors_device(backend: Backend) -> None:
    device = "cuda" if backend == "nccl" else "cpu"
    assert run_distributed(added_up, backend=backend, timeout_s=120.0) == [(device, [3, 3, 3])] * 2


@on_each_backend()
def test_encoder_trains_to_finite_weights(backend: Backend, tmp_path: Path) -> None:
    dataset = write_items(tmp_path / "dataset")
    training = {"training": {"epochs": 1}}
    run_distributed(train_encoder, dataset, tmp_path / "out", training, backend=backend, timeout_s=300.0)
    state = load_bundle(tmp_path / "out", torch.device("cpu")).model.state_dict()
    assert state and all(tensor.isfinite().all() for tensor in state.values())


def losses_of_side(world: World, dataset: Path, steps: int) -> list[list[float]]:
    return run_steps(world, dataset, config_of("side"), steps).losses


@on_each_backend()
def test_side_arm_on_two_ranks_has_the_losses_of_one_cpu(backend: Backend, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset")
    expected = run_distributed(losses_of_side, dataset, 4, world_size=1)[0]
    found = run_distributed(losses_of_side, dataset, 4, backend=backend, timeout_s=300.0)
    for losses in found:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-4)
