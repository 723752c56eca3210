"""Distributed start-up, and the rule that a failure on one rank is a failure on every rank."""

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import PositiveFloat

from infra.config import Config, parse
from infra.errors import ConfigError, SidestackError, StageError, TrainingError

T = TypeVar("T")


class Timeouts(Config):
    """How long a rank waits in a collective for the others, in seconds.

    The driver hands them to the stages in environment variables; a stage run by hand reads the same ones.
    """

    collective_s: PositiveFloat = 600.0
    """Of the collectives of training, reading and evaluation."""
    commit_s: PositiveFloat = 86_400.0
    """Of those around a commit, where a rank may wait for others to write, sync and hash their files."""

    def environment(self) -> dict[str, str]:
        """Return the variables that `of_environment` reads."""
        return {_variable(name): str(value) for name, value in self}

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Timeouts":
        """Read the variables; one that is not set has its default.

        Raises:
            ConfigError: a value is not a positive number.
        """
        names = (name for name in cls.model_fields if _variable(name) in environment)
        return parse(cls, {name: environment[_variable(name)] for name in names}, "environment: timeouts")


GPUS_VARIABLE = "SIDESTACK_GPUS"
"""How many GPUs a host must have: a job that asked for some does not run on the CPU without a word."""


def _variable(name: str) -> str:
    return f"SIDESTACK_TIMEOUT_{name.upper()}"


@dataclass(frozen=True)
class World:
    """The process group a stage runs in.

    Attributes:
        rank: this process's number, 0 to size - 1.
        size: the number of processes.
        local_rank: this process's number on its host; its GPU's number under nccl.
        device: where tensors live.
        backend: ``gloo`` or ``nccl``.
        group: the group of this module's collectives; None is the default group.
        commit_group: the same ranks under gloo, with the timeout of commits; None is the default group.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup | None = None
    commit_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and commits."""
        return self.rank == 0

    @property
    def committing(self) -> "World":
        """The same ranks, whose collectives wait as long as a commit may take (`Timeouts.commit_s`)."""
        return replace(self, group=self.commit_group)


ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
"""One process by itself: no function of this module waits for another rank."""


@contextlib.contextmanager
def started(timeouts: Timeouts | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    The backend is nccl where GPUs are visible, one for each local rank, else gloo. The groups are destroyed at exit.

    Args:
        timeouts: how long a collective may wait for a rank; by default the defaults of `Timeouts`.

    Raises:
        ConfigError: fewer GPUs are visible than there are local ranks, or than the job asked for.
    """
    timeouts = timeouts or Timeouts()
    # A process of its own keeps its store to itself: a port that was found free may be taken by the time it is used.
    alone: dict[str, Any] = {}
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = _require_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
    backend = "nccl" if has_gpu else "gloo"
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    # Under nccl, gloo serves collectives of small Python objects on the CPU.
    backends = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(backends, timeout=timedelta(seconds=timeouts.collective_s), **alone)
    try:
        commit_group = dist.new_group(timeout=timedelta(seconds=timeouts.commit_s), backend="gloo")
        world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, backend)
        yield replace(world, commit_group=commit_group)
    finally:
        dist.destroy_process_group()


def _require_gpus(ranks: int) -> bool:
    """Return whether this host's ranks use GPUs, of which each has its own.

    Raises:
        ConfigError: fewer are visible than there are ranks, or than the job asked for.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = int(os.environ.get(GPUS_VARIABLE, "0"))
    if (visible or asked) and visible < max(ranks, asked):
        wanted = f"the job asked for {asked}" if asked > ranks else f"{ranks} ranks need one each"
        raise ConfigError(
            f"host {socket.gethostname()}: {visible} GPUs are visible, and {wanted}; start fewer ranks, or hide the"
            " GPUs (CUDA_VISIBLE_DEVICES=, or launch.*.gpu: 0) to run on the CPU; a CPU image sees none"
        )
    return visible > 0


def gather(world: World, value: T) -> list[T]:
    """Return on every rank the list of all ranks' values (small, JSON-like objects), in rank order."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value, group=world.group)
    return values  # type: ignore[return-value]


def broadcast(world: World, value: T) -> T:
    """Return on every rank what rank 0 passed."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.group)
    return box[0]


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier(group=world.group)


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of `values` over all ranks, as a new tensor of the same shape and type."""
    total = values.detach().clone()
    if world.size > 1:
        dist.all_reduce(total, group=world.group)
    return total


def average_gradients(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; the ranks must have gradients of the same parameters.

    One buffer in the parameters' order, not DistributedDataParallel's buckets: those are laid out anew after the first
    step, by the order in which gradients came, and a ring adds three or more ranks up in the order of the layout. A
    run that goes on from a checkpoint would then differ in last bits from one that was never stopped.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world.size == 1 or not gradients:
        return
    mean = sum_over_ranks(world, torch.nn.utils.parameters_to_vector(gradients)) / world.size
    torch.nn.utils.vector_to_parameters(mean, gradients)


def require_same(world: World, value: str, what: str) -> None:
    """Check that a text, such as a digest, is the same on every rank.

    Raises:
        TrainingError: on every rank; names what differs, the ranks and their texts.
    """
    values = gather(world, value)
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
        raise TrainingError(f"{what} is not the same on every rank: {listed}")


@contextlib.contextmanager
def together(world: World, what: str) -> Iterator[None]:
    """Raise on every rank when the body raises on any.

    A rank that fails alone would leave the others waiting in their next collective until the timeout. The body
    must hold no collective that a failing rank would skip: it is for reading, planning, building and writing.

    Args:
        world: the process group.
        what: what is being done, for the message on ranks that did not fail themselves.

    Raises:
        StageError: on a rank that did not fail itself, with the failing rank's message. The failing rank raises
            its own error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    _raise_everywhere(world, failure, what)


def lockstep(world: World, items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate on every rank in step, raising on every rank when one rank's source raises.

    Every rank must hold the same number of items; one small all-reduce an item is the price.

    Raises:
        StageError: see `together`.
    """
    source = iter(items)
    end = object()
    while True:
        item: object = end
        failure: Exception | None = None
        try:
            item = next(source, end)
        except Exception as error:
            failure = error
        _raise_everywhere(world, failure, what)
        if item is end:
            return
        yield item  # type: ignore[misc]


def _raise_everywhere(world: World, failure: Exception | None, what: str) -> None:
    # The usual case costs one integer; the messages travel only when there are some.
    failed = sum_over_ranks(world, torch.tensor([int(failure is not None)]))
    if not failed.item():
        return
    reports = gather(world, None if failure is None else _describe(failure))
    if failure is not None:
        raise failure
    rank, report = next((rank, report) for rank, report in enumerate(reports) if report is not None)
    raise StageError(f"{what}: rank {rank} failed: {report}")


def _describe(failure: Exception) -> str:
    return str(failure) if isinstance(failure, SidestackError) else f"{type(failure).__name__}: {failure}"
