"""Process groups: timeouts, collectives, errors on every rank, lockstep reading and the number of GPUs."""

import contextlib
import socket
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from sidestack.components import torchrun
from sidestack.infra import distributed
from sidestack.infra.distributed import (
    GPUS_VARIABLE,
    Timeouts,
    World,
    broadcast,
    gather,
    lockstep,
    lockstep_sums,
    raise_on_all_ranks,
    require_same,
    sum_over_ranks,
)
from sidestack.infra.errors import ConfigError, DataError, StageError, TrainingError
from tests.distributed import RankFailure, run_distributed


def test_timeouts_are_restored_from_the_environment() -> None:
    timeouts = Timeouts(collective_s=30.5, commit_s=7200)
    assert Timeouts.of_environment({"HOME": "/", **timeouts.environment()}) == timeouts
    assert Timeouts.of_environment({"SIDESTACK_TIMEOUT_COMMIT_S": "5"}) == Timeouts(commit_s=5)


@pytest.mark.parametrize("value", ["soon", "0"])
def test_timeout_that_is_not_a_positive_number_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: timeouts.commit_s: .*{value}"):
        Timeouts.of_environment({"SIDESTACK_TIMEOUT_COMMIT_S": value})


def collectives(world: World) -> tuple[list[int], str, list[int]]:
    total = sum_over_ranks(world, torch.tensor([world.rank + 1, 10]))
    return gather(world, world.rank), broadcast(world, f"from {world.rank}"), total.tolist()


def test_collectives_agree_on_every_rank() -> None:
    assert run_distributed(collectives) == [([0, 1], "from 0", [3, 20])] * 2


def fail_on_rank_1(world: World) -> None:
    with raise_on_all_ranks(world, "reading"):
        if world.rank == 1:
            raise DataError("x.parquet: broken")


def test_failure_on_one_rank_is_raised_on_all() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(fail_on_rank_1)
    first, second = failure.value.errors
    assert first and "StageError: reading: rank 1 failed: x.parquet: broken" in first
    assert second and "DataError: x.parquet: broken" in second


def source(world: World, fail_at: int) -> list[int]:
    def items():  # type: ignore[no-untyped-def]
        for number in range(4):
            if world.rank == 0 and number == fail_at:
                raise DataError(f"batch {number}")
            yield number

    return list(lockstep(world, items(), "streaming"))


def test_lockstep_yields_all_items() -> None:
    assert run_distributed(source, -1) == [[0, 1, 2, 3]] * 2


def test_lockstep_raises_on_every_rank_at_the_same_item() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(source, 2)
    assert all(error and "batch 2" in error for error in failure.value.errors)


def test_lockstep_prefetches_one_item() -> None:
    assert run_distributed(read_ahead) == [["read 0", "read 1", "use 0", "read 2", "use 1", "use 2"]] * 2


def read_ahead(world: World) -> list[str]:
    done: list[str] = []

    def items() -> Iterator[int]:
        for number in range(3):
            done.append(f"read {number}")
            yield number

    for number in lockstep(world, items(), "streaming"):
        done.append(f"use {number}")
    return done


def own_numbers(world: World, number: int) -> torch.Tensor:
    if number == 2 and world.rank == 1:
        raise DataError("numbers of batch 2")
    return torch.tensor([number, 10.0 * world.rank + number], dtype=torch.float64)


def sums(world: World) -> list[list[float]]:
    found = []
    with contextlib.suppress(DataError, StageError):
        for number, summed in lockstep_sums(world, range(4), "counting", partial(own_numbers, world), 2):
            found.append([number, *summed.tolist()])
    return found


def test_lockstep_sums_numbers_over_ranks_and_stops_when_a_rank_fails() -> None:
    assert run_distributed(sums) == [[[0, 0, 10], [1, 2, 12]]] * 2
    assert run_distributed(sums, world_size=1) == [[[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]]


def words(world: World) -> None:
    require_same(world, "abc", "the word")
    with pytest.raises(TrainingError, match="step 3: the word is not the same on every rank: rank 0: w0, rank 1: w1$"):
        require_same(world, f"w{world.rank}", "step 3: the word")


def test_different_values_are_named_on_every_rank() -> None:
    run_distributed(words)


@pytest.mark.parametrize(
    ("visible", "requested", "ranks", "message"),
    [
        (1, None, 2, "1 GPUs are visible, and 2 ranks need one each"),
        (0, "2", 2, "0 GPUs are visible, and 2 ranks need one each"),
        (4, "8", 4, "4 GPUs are visible, and the job asked for 8"),
    ],
)
def test_fewer_gpus_than_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, visible: int, requested: str | None, ranks: int, message: str
) -> None:
    see_gpus(monkeypatch, visible, requested)
    with pytest.raises(ConfigError, match=message):
        distributed._require_gpus(ranks)


@pytest.mark.parametrize(("visible", "requested", "uses"), [(0, None, False), (2, None, True), (8, "2", True)])
def test_ranks_use_the_gpus_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: int, requested: str | None, uses: bool
) -> None:
    see_gpus(monkeypatch, visible, requested)
    assert distributed._require_gpus(2) == uses


def see_gpus(monkeypatch: pytest.MonkeyPatch, visible: int, requested: str | None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.delenv(GPUS_VARIABLE, raising=False)
    if requested is not None:
        monkeypatch.setenv(GPUS_VARIABLE, requested)


def test_components_use_the_same_variable_for_gpus() -> None:
    assert torchrun.GPUS_VARIABLE == GPUS_VARIABLE


def test_rank_reports_a_torchrun_that_was_killed_before_it_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0}
    for name, value in {**place, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 1.0)
    with pytest.raises(StageError, match=f"torchrun at 127.0.0.1:{port} did not answer for 1 s: it was killed"):
        with distributed.process_group():
            pass
