import pytest
import torch

from infra.distributed import World, broadcast, gather, lockstep, sum_over_ranks, together
from infra.errors import DataError
from tests.distributed import RankFailure, run_distributed


def collectives(world: World) -> tuple[list[int], str, list[int]]:
    total = sum_over_ranks(world, torch.tensor([world.rank + 1, 10]))
    return gather(world, world.rank), broadcast(world, f"from {world.rank}"), total.tolist()


def test_collectives_agree_on_every_rank() -> None:
    assert run_distributed(collectives) == [([0, 1], "from 0", [3, 20])] * 2


def fail_on_rank_1(world: World) -> None:
    with together(world, "reading"):
        if world.rank == 1:
            raise DataError("x.parquet: broken")


def test_a_failure_on_one_rank_is_raised_on_all() -> None:
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


def test_lockstep_passes_items_on() -> None:
    assert run_distributed(source, -1) == [[0, 1, 2, 3]] * 2


def test_lockstep_raises_on_every_rank_at_the_same_item() -> None:
    with pytest.raises(RankFailure) as failure:
        run_distributed(source, 2)
    assert all(error and "batch 2" in error for error in failure.value.errors)
