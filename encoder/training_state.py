"""The state that a training needs to resume bit for bit, as tensors for a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sidestack.infra.distributed import World

Tensors = dict[str, Tensor]


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the moments of every parameter as `<number>.<name>`; the schedule's state has the learning rates."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, moments in state.items() for name, tensor in moments.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the moments that `optimizer_state` returned."""
    moments: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        moments.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def schedule_state(schedule: torch.optim.lr_scheduler.LambdaLR) -> dict[str, Any]:
    """Return a schedule's state, and the learning rates it has set, as JSON-ready values."""
    return {"state": schedule.state_dict(), "rates": [group["lr"] for group in schedule.optimizer.param_groups]}


def load_schedule_state(schedule: torch.optim.lr_scheduler.LambdaLR, values: Mapping[str, Any]) -> None:
    """Load the state that `schedule_state` returned."""
    schedule.load_state_dict(dict(values["state"]))
    for group, rate in zip(schedule.optimizer.param_groups, values["rates"], strict=True):
        group["lr"] = rate


def random_state(device: torch.device) -> Tensors:
    """Return the state of torch's global generators, on the CPU and on this rank's GPU."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def load_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Load the state that `random_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return a part's tensors with `<prefix>.` before their names."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with a prefix from `prefixed`, by their own names."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def seed_rank(seed: int, world: World) -> None:
    """Seed torch's global generators, differently on each rank: dropout must not affect the same rows on all ranks."""
    torch.manual_seed(seed + (world.rank << 32))
