"""The number of messages that ranks exchange in a step, and equal results with fewer messages."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from sidestack.infra.distributed import World
from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.constants import read_constants
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.sharding import build_sharded
from sidestack.ranker.step_runner import StepRunner
from tests.distributed import run_distributed
from tests.ranker.dataset import write_dataset
from tests.ranker.training import config_of

ARMS = ("none", "side", "sid_ngram")


class Collectives(TorchDispatchMode):
    """Record every collective by the name of its operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Counted(NamedTuple):
    """A training: the totals of each step, the collectives of the fifth, and the kinds of sharding.

    `ways` is the number of kinds of sharding of a collection's tables, summed over all collections.
    """

    totals: list[list[float]]
    collectives: Counter[str]
    ways: int


def train(world: World, dataset: Path, arm: str, is_plain: bool) -> Counted:
    config, snapshot = config_of(arm), read_dataset(dataset)
    fitting, _ = open_splits(snapshot, config)
    sharded = build_sharded(fitting.features, config, world, read_constants(snapshot, fitting.features.constants))
    runner = StepRunner(sharded, fitting.features, world, NewestEntries())
    if is_plain:
        runner.pipeline = TrainPipelineSparseDist(sharded.model, sharded.optimizer, world.device)
    steps = runner.run(fitting.open(config.training, world, is_training=True), 0)
    outputs = [output for _, output in islice(steps, 4)]
    with Collectives() as collectives:
        outputs.append(next(steps)[1])
    outputs += [output for _, output in steps]
    ways = sum(len(collection._lookups) for collection in sharded.model.module.collections)
    return Counted([output.totals_3T.flatten().tolist() for output in outputs], Counter(collectives.found), ways)


def train_all(world: World, dataset: Path) -> dict[tuple[str, bool], Counted]:
    return {(arm, is_plain): train(world, dataset, arm, is_plain) for arm in ARMS for is_plain in (False, True)}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Counted]:
    dataset = write_dataset(tmp_path_factory.mktemp("collectives") / "dataset", rows_a_day=192, impressions=6)
    first, second = run_distributed(train_all, dataset)
    assert first == second
    found: dict[tuple[str, bool], Counted] = first
    return found


@pytest.mark.parametrize("arm", ARMS)
def test_step_sends_four_messages_and_two_for_every_kind_of_sharding(
    trainings: dict[tuple[str, bool], Counted], arm: str
) -> None:
    ours, plain = trainings[arm, False], trainings[arm, True]
    assert ours.ways == {"none": 3, "side": 3, "sid_ngram": 4}[arm]
    # All-to-all: vectors forward and gradients backward, the number of ids, and the ids. All-reduce: agreement and
    # counts, then gradients and losses.
    assert ours.collectives == {"alltoall_base_": 2 * ours.ways + 2, "allreduce_": 2}
    # torchrec sends the ids, and their number per lookup, separately for every kind of sharding.
    assert plain.collectives == {"alltoall_base_": 4 * ours.ways + 1, "allreduce_": 2}


@pytest.mark.parametrize("arm", ARMS)
def test_ids_sent_together_give_the_same_totals_as_ids_sent_separately(
    trainings: dict[tuple[str, bool], Counted], arm: str
) -> None:
    assert len(trainings[arm, False].totals) == 4 * 192 // 64
    assert trainings[arm, False].totals == trainings[arm, True].totals
