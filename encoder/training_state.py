"""The states that a training must take up again to go on bit for bit, as tensors for a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sidestack.infra.distributed import World

Tensors = dict[str, Tensor]


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the moments of every parameter under `<number>.<name>`; the rates are the schedule's."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, moments in state.items() for name, tensor in moments.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up the moments that `optimizer_state` gave."""
    moments: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def schedule_state(schedule: torch.optim.lr_scheduler.LambdaLR) -> dict[str, Any]:
    """Return a schedule's state, and the rates it has set, as JSON-ready values."""
    return {"state": schedule.state_dict(), "rates": [group["lr"] for group in schedule.optimizer.param_groups]}


def load_schedule_state(schedule: torch.optim.lr_scheduler.LambdaLR, values: Mapping[str, Any]) -> None:
    """Take up what `schedule_state` gave."""
    schedule.load_state_dict(dict(values["state"]))
    for group, rate in zip(schedule.optimizer.param_groups, values["rates"], strict=True):
        group["lr"] = rate


def random_state(device: torch.device) -> Tensors:
    """Return the state of torch's global generators, of the CPU and of this rank's GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Take up what `random_state` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Put a part's tensors under `<prefix>.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors that `prefixed` put under a prefix, under their own names."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def seed_rank(seed: int, world: World) -> None:
    """Seed torch's global generators; ranks differ, or they would hide and shorten the same rows of their batches."""
    torch.manual_seed(seed + (world.rank << 32))
