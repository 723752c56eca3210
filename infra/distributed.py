"""Distributed start-up, and the rule that a failure on one rank is a failure on every rank."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import PositiveFloat
from torch.distributed.rendezvous import rendezvous

from sidestack.infra.config import Config, parse
from sidestack.infra.errors import ConfigError, PreemptedError, SidestackError, StageError, TrainingError
from sidestack.infra.logs import LOG
from sidestack.infra.rank_state import RankState

T = TypeVar("T")


class Timeouts(Config):
    """Collective timeouts, in seconds, by kind of work.

    The driver passes them to the stages in environment variables; a stage run by hand reads the same ones. In a stage,
    only time without progress of the other rank counts (`infra.watchdog`): long work is not a failure.
    """

    collective_s: PositiveFloat = 600.0
    """For a rank without progress, in collectives of training, reading and evaluation; for a rank without heartbeat,
    in every collective."""
    commit_s: PositiveFloat = 86_400.0
    """For a rank without progress, in collectives around a commit, while it writes, syncs or hashes its files."""
    warning_s: PositiveFloat = 30.0
    """Time after which a wait is logged, with the rank that is waited for and its current work."""
    stop_s: PositiveFloat = 20.0
    """Time after a stop signal within which all ranks must agree to stop; a rank that is at work for longer exits."""

    def environment(self) -> dict[str, str]:
        """Return the environment variables that `of_environment` reads."""
        return {_variable(name): str(value) for name, value in self}

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Timeouts":
        """Read the environment variables; one that is not set has its default.

        Raises:
            ConfigError: a value is not a positive number.
        """
        names = (name for name in cls.model_fields if _variable(name) in environment)
        return parse(cls, {name: environment[_variable(name)] for name in names}, "environment: timeouts")


GPUS_VARIABLE = "SIDESTACK_GPUS"
"""How many GPUs a host must have: a job that requested GPUs must not silently run on the CPU."""


def _variable(name: str) -> str:
    return f"SIDESTACK_TIMEOUT_{name.upper()}"


@dataclass(frozen=True)
class World:
    """The process group a stage runs in.

    Attributes:
        rank: this process's number, 0 to size - 1.
        size: the number of processes.
        local_rank: this process's number on its host; its GPU's number under nccl.
        device: the device of tensors.
        backend: ``gloo`` or ``nccl``.
        group: the process group of this module's collectives; None is the default group.
        commit_group: the same ranks under gloo, with the timeout of commits; None is the default group.
        state: the current work of this rank, and whether it was asked to stop.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    backend: str
    group: dist.ProcessGroup | None = None
    commit_group: dist.ProcessGroup | None = None
    state: RankState = field(default_factory=RankState, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and commits."""
        return self.rank == 0

    @property
    def committing(self) -> "World":
        """The same ranks, with the collective timeout of commits (`Timeouts.commit_s`)."""
        return replace(self, group=self.commit_group)

    @property
    def is_committing(self) -> bool:
        """Whether this world was returned by `committing`."""
        return self.commit_group is not None and self.group is self.commit_group


JOIN_SECONDS = 30.0
"""Timeout for a rank started by torchrun to connect to torchrun's store."""

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
"""A world of one process: no function of this module waits for another rank."""


@contextlib.contextmanager
def process_group(timeouts: Timeouts | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes; without torchrun, a group of one.

    The backend is nccl where GPUs are visible, one for each local rank, else gloo. The groups are destroyed at exit.

    Args:
        timeouts: the collective timeouts; by default those of `Timeouts()`.

    Raises:
        ConfigError: fewer GPUs are visible than there are local ranks, or than the job requested.
        StageError: torchrun, which started this rank, does not answer.
    """
    timeouts = timeouts or Timeouts()
    # A single process uses a local HashStore: a port that was found free may be taken by the time it is used.
    at: dict[str, Any] = {}
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        at = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        at = _join_torchrun(timeouts)
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = _require_gpus(int(os.environ["LOCAL_WORLD_SIZE"]))
    backend = "nccl" if has_gpu else "gloo"
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    # Under nccl, gloo serves collectives of small Python objects on the CPU.
    backends = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    dist.init_process_group(backends, timeout=timedelta(seconds=timeouts.collective_s), **at)
    try:
        commit_group = dist.new_group(timeout=timedelta(seconds=timeouts.commit_s), backend="gloo")
        world = World(dist.get_rank(), dist.get_world_size(), local_rank, device, backend)
        yield replace(world, commit_group=commit_group)
    finally:
        dist.destroy_process_group()


def _join_torchrun(timeouts: Timeouts) -> dict[str, Any]:
    """Return torchrun's store, this rank and the number of ranks, as arguments of `init_process_group`.

    The store exists before torchrun starts a rank. If it does not answer, torchrun was killed while this rank started,
    and no launcher is left to end the rank: the timeout between ranks, `collective_s`, would be too long.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise StageError(
            f"host {socket.gethostname()}: torchrun at {address} did not answer for {JOIN_SECONDS:g} s: it was killed,"
            " or the address cannot be reached from here"
        ) from error
    store.set_timeout(timedelta(seconds=timeouts.collective_s))
    return {"store": store, "rank": rank, "world_size": size}


def _require_gpus(ranks: int) -> bool:
    """Return whether this host's ranks use GPUs, one GPU per rank.

    Raises:
        ConfigError: fewer are visible than there are ranks, or than the job requested.
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


def local_size(world: World) -> int:
    """Return the number of a world's ranks on this host."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), world.size)


def gather(world: World, value: T) -> list[T]:
    """Gather small, JSON-like values: return on every rank the list of all ranks' values, in rank order."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    with world.state.waiting():
        dist.all_gather_object(values, value, group=world.group)
    return values  # type: ignore[return-value]


def broadcast(world: World, value: T) -> T:
    """Return rank 0's value on every rank."""
    if world.size == 1:
        return value
    box = [value]
    with world.state.waiting():
        dist.broadcast_object_list(box, src=0, group=world.group)
    return box[0]


def barrier(world: World) -> None:
    """Wait until every rank has called this."""
    if world.size > 1:
        with world.state.waiting():
            dist.barrier(group=world.group)


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of `values` over all ranks, as a new tensor of the same shape and type."""
    total = values.detach().clone()
    if world.size > 1:
        with world.state.waiting():
            dist.all_reduce(total, group=world.group)
    return total


def require_same(world: World, value: str, what: str) -> None:
    """Check that a text, such as a digest, is the same on every rank.

    Raises:
        TrainingError: on every rank; it names `what`, the ranks and their texts.
    """
    values = gather(world, value)
    if len(set(values)) > 1:
        listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
        raise TrainingError(f"{what} is not the same on every rank: {listed}")


@contextlib.contextmanager
def raise_on_all_ranks(world: World, what: str) -> Iterator[None]:
    """Raise on every rank if the body raises on any.

    A rank that fails alone would leave the others waiting in their next collective until the timeout. The body
    must contain no collective that a failing rank would skip: it is for reading, planning, building and writing.

    Args:
        world: the process group.
        what: names the work, for the message on ranks that did not fail themselves, and for the watchdog.

    Raises:
        StageError: on a rank that did not fail itself, with the failing rank's message. The failing rank raises
            its own error.
        PreemptedError: on every rank; some rank was asked to stop, and this work may stop (`RankState.may_stop`).
    """
    failure: Exception | None = None
    LOG.debug(what)
    with world.state.at(what, world.is_committing):
        try:
            yield
        except Exception as error:
            failure = error
        _raise_everywhere(world, failure, what)
    world.state.stop_if_agreed()


def lockstep(world: World, items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate on every rank in step, raising on every rank when one rank's source raises; see `lockstep_sums`."""
    return (item for item, _ in lockstep_sums(world, items, what, lambda _: torch.empty(0), 0))


def lockstep_sums(
    world: World, items: Iterable[T], what: str, numbers: Callable[[T], torch.Tensor], width: int
) -> Iterator[tuple[T, torch.Tensor]]:
    """Iterate on every rank in step, and yield each item with sums over ranks of some numbers of the item.

    Every rank must have the same number of items. One small all-reduce per item carries the numbers and whether each
    rank has its item. It is prefetched by one item, so that it overlaps with the use of the item before: the source is
    read one item ahead. The all-reduce also carries stop requests (`RankState.must_stop`); the caller must obey them
    once it has finished with the last item.

    Args:
        world: the process group. items: this rank's. what: names the work, for the message on other ranks.
        numbers: returns the numbers of an item, float64 [width], on the CPU. width: how many.

    Raises:
        StageError: a rank's source raised, at the item where it did; see `raise_on_all_ranks`.
    """
    source, end = iter(items), object()

    def upcoming() -> tuple[object, Exception | None, torch.Tensor, dist.Work | None]:
        item: object = end
        failure: Exception | None = None
        sums = torch.zeros(2 + width, dtype=torch.float64)
        with world.state.at(what, world.is_committing):
            try:
                item = next(source, end)
                if item is not end:
                    sums[2:] = numbers(item)  # type: ignore[arg-type]
            except Exception as error:
                failure = error
        sums[:2] = _report(world, failure)
        work = dist.all_reduce(sums, group=world.group, async_op=True) if world.size > 1 else None
        return item, failure, sums, work

    ahead = upcoming()
    while True:
        item, failure, sums, work = ahead
        if work is not None:
            with world.state.at(what, world.is_committing), world.state.waiting():
                work.wait()
        _raise_reported(world, failure, sums[:2], what)
        if item is end:
            return
        ahead = upcoming()
        yield item, sums[2:]  # type: ignore[misc]


def _raise_everywhere(world: World, failure: Exception | None, what: str) -> None:
    # The usual case sends two integers; messages are sent only after a failure.
    _raise_reported(world, failure, sum_over_ranks(world, _report(world, failure)), what)


def _report(world: World, failure: Exception | None) -> torch.Tensor:
    """Return two numbers to be summed over ranks: whether this rank failed, and whether it was asked to stop."""
    has_failed = failure is not None and not isinstance(failure, PreemptedError)
    return torch.tensor([has_failed, world.state.signal is not None], dtype=torch.float64)


def _raise_reported(world: World, failure: Exception | None, reports: torch.Tensor, what: str) -> None:
    """Raise on every rank if some rank has failed, and note if some rank was asked to stop.

    Args:
        world: the process group. failure: this rank's. reports: the sums of `_report` over ranks. what: names the work.
    """
    failed, asked = reports.tolist()
    world.state.must_stop |= asked > 0
    if not failed:
        if failure is not None:
            raise failure
        return
    has_stopped = isinstance(failure, PreemptedError)
    messages = gather(world, None if failure is None or has_stopped else _describe(failure))
    if failure is not None and not has_stopped:
        raise failure
    rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
    raise StageError(f"{what}: rank {rank} failed: {message}")


def _describe(failure: Exception) -> str:
    return str(failure) if isinstance(failure, SidestackError) else f"{type(failure).__name__}: {failure}"
