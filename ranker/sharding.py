"""Sharding of a model with tables on the meta device, and its optimizers, on gloo and nccl alike."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sidestack.infra.distributed import World, broadcast, gather, raise_on_all_ranks
from sidestack.infra.gradients import OverlappedAverage
from sidestack.infra.shards import Shard, Spread
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.config import TrainingConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.cpu_sequence_lookup import speed_up_sequences
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.initial import fill_dense, fill_table
from sidestack.ranker.model import Ranker
from sidestack.ranker.planner import Cluster, TablePlan, Traffic, plan_tables, sharders, unsharded_model

ONE_OF_EACH = Traffic()
"""One history entry per request and one request per row, if not measured."""
COLLECTIONS = ("bags", "request_bags", "sequences")
"""The model's collections of tables, by the name of their module."""
OPTIMIZER = "optimizer."
"""Prefix of the names of optimizer states in `ShardedRanker.state`."""

# torch's log messages about the pipeline's tracing, on every rank, are of no use to the user of a stage.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass(frozen=True)
class ShardedRanker:
    """The model over all ranks, with its optimizers.

    Attributes:
        model: tables sharded by the plan, the rest replicated on every rank.
        optimizer: all optimizers as one; the tables' own runs inside the backward pass.
        dense_optimizer: Adam, for everything but the tables.
        plan: the tables' placement, with its memory estimates.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    dense_optimizer: KeyedOptimizerWrapper
    plan: TablePlan

    def set_learning_rates(self, sparse: float, dense: float) -> None:
        """Set the learning rates of the tables and of the rest, from the next step on."""
        for group in self.model.fused_optimizer.param_groups:
            group["lr"] = sparse
        for group in self.dense_optimizer.param_groups:
            group["lr"] = dense

    def restart_tables(self, seed: int) -> None:
        """Reset the tables to their initial weights and their optimizers' states to zeros; the rest is unchanged."""
        # First, because reading the state writes a GPU's cached rows back over the table in host memory.
        for module in self.model.modules():
            if isinstance(module, ShardedEmbeddingBagCollection | ShardedEmbeddingCollection):
                for lookup in module._lookups:
                    lookup.purge()
        fill_tables(self.model, seed)
        for name, tensor in self.state().items():
            if name.startswith(OPTIMIZER) and table_of(name) is not None:
                for _, part in local_parts(tensor):
                    part.zero_()

    def make_dense_state(self) -> None:
        """Create the states that Adam otherwise has after its first step, to load into them; weights are unchanged."""
        self.dense_optimizer.init_state()
        self.dense_optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Return all weights and optimizer states by name: the tensors themselves, sharded or the same on every rank.

        Adam has no states before its first step.
        """
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, states in self.optimizer.state_dict()["state"].items():
            found |= {f"{OPTIMIZER}{parameter}.{name}": x for name, x in states.items() if isinstance(x, Tensor)}
        return found

    def shards(self, features: ArmFeatures) -> dict[str, Spread]:
        """Return the tensors of `state` that are sharded over the ranks: tables, and the states of their rows.

        A table of ids may grow between saving and loading: new rows keep their initial weights, old rows keep their
        weights and states. A hashed table may not grow, as its ids would move to other rows, nor may a table of SIDs.

        Args:
            features: the id features of the tables.
        """
        return self.parted_state(features)[1]

    def parted_state(self, features: ArmFeatures) -> tuple[dict[str, Tensor], dict[str, Spread]]:
        """Return `state` in two parts: tensors that are the same on every rank, and sharded tensors (see `shards`)."""
        tables = features.tables
        growing = {feature.table: feature.rows for feature in tables if not (feature.is_hashed or feature.is_sid)}
        whole, spread = {}, {}
        for name, tensor in self.state().items():
            if not isinstance(tensor, ShardedTensor):
                whole[name] = tensor
                continue
            shape = tuple(tensor.size())
            parts = [Shard(offset, part) for offset, part in local_parts(tensor)]
            # In column-wise sharding, row states are stored shard after shard of columns: they cannot grow.
            spread[name] = Spread(shape, parts, may_grow=growing.get(table_of(name) or "") == shape[0])
        return whole, spread

    def held_rows(
        self, features: ArmFeatures, rows_of: Mapping[str, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield, of each local part of weights and states with some of the rows: the part, their places, their values.

        Args:
            features: the id features of the tables. rows_of: rows by table.
        """
        num_rows = {one.table: one.rows for one in features.tables}
        for name, tensor in self.state().items():
            table = table_of(name)
            if table is None or table not in rows_of:
                continue
            for offset, part in local_parts(tensor):
                if not part.dim():  # a step counter
                    continue
                # In column-wise sharding, row states are stored shard after shard of columns.
                row_P = (torch.arange(len(part)) + offset[0]) % num_rows[table]
                places = torch.isin(row_P, rows_of[table]).nonzero().squeeze(1).to(part.device)
                held = part.detach()
                yield held, places, held[places]


def build_sharded(
    features: ArmFeatures,
    config: DecidedConfig,
    world: World,
    constants: ModelConstants,
    traffic: Traffic = ONE_OF_EACH,
) -> ShardedRanker:
    """Build the model, plan its tables, shard it, and initialize its weights.

    Args:
        features: what the arm reads and looks up. config: the arm's resolved configuration.
        world: the process group; every rank must call.
        constants: the constants that the arm's content needs.
        traffic: average lookups of a batch, for the planner's estimates.

    Raises:
        NoPlanError: the tables do not fit the planner's memory (on rank 0). StageError: the same, on other ranks.
    """
    model = unsharded_model(features, config, world.device, constants)
    fill_dense(model.body, config.training.seed)
    plan = _plan_together(model, features, config, world, traffic)
    sharded, dense_optimizer = shard(model, plan.sharding, config.training, world, model.loss.take_unsummed)
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense_optimizer])
    return ShardedRanker(sharded, optimizer, dense_optimizer, plan)


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    training: TrainingConfig,
    world: World,
    unsummed: Callable[[], Tensor | None] = lambda: None,
) -> tuple[DistributedModelParallel, KeyedOptimizerWrapper]:
    """Shard a model's tables by the plan, initialize them, and return the model and the dense optimizer.

    Args:
        model: its tables on the meta device, each with its optimizer; the rest initialized. plan: the placement.
        training: seed and learning rate. world: the process group; every rank must call.
        unsummed: returns a step's numbers to be summed over ranks, in place, together with the gradients.
    """
    sharded = DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(torch.distributed.GroupMember.WORLD),
        device=world.device,
        plan=plan,
        sharders=sharders(),
        init_data_parallel=False,  # see `_dense_optimizer`
    )
    speed_up_sequences(sharded, world.device)
    fill_tables(sharded, training.seed)
    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: _dense_optimizer(parameters, training, world, unsummed),
    )
    return sharded, dense_optimizer


def _dense_optimizer(
    parameters: list[nn.Parameter], training: TrainingConfig, world: World, unsummed: Callable[[], Tensor | None]
) -> torch.optim.Optimizer:
    """Return Adam for the network, on gradients that are averaged over the ranks before each step.

    DistributedDataParallel is not used: from its second step on it sums in another layout, so a resumed training would
    differ in the last bits (`infra.gradients.GradientMessage`).
    """
    optimizer = torch.optim.Adam(parameters, lr=training.dense_learning_rate, fused=True)
    average = OverlappedAverage(world, parameters, unsummed)
    optimizer.register_step_pre_hook(lambda *_: average.finish())
    return optimizer


def _plan_together(
    model: Ranker, features: ArmFeatures, config: DecidedConfig, world: World, traffic: Traffic
) -> TablePlan:
    """Plan on rank 0 and broadcast the plan; a planner's error is raised on every rank.

    With torchrec's `collective_plan` alone, an error on rank 0 would leave the others waiting until a timeout.
    """
    plan: TablePlan | None = None
    with raise_on_all_ranks(world, "planning the embedding tables"):
        if world.is_main:
            plan = plan_tables(model, features, config, Cluster.of(world, config.sharding), traffic)
    agreed = broadcast(world, plan)
    assert agreed is not None
    return agreed


def fill_tables(model: DistributedModelParallel, seed: int) -> None:
    """Fill every shard that this rank holds with its initial weights; see `ranker.initial`."""
    for name, table in model.state_dict().items():
        if not isinstance(table, ShardedTensor):
            continue
        for shard in table.local_shards():
            rows_from, columns_from = shard.metadata.shard_offsets
            # The same values whether the column belongs to requests or to rows.
            of_any = name.removeprefix("request_")
            fill_table(shard.tensor, of_any, seed, rows_from, columns_from, table.size()[1])


def table_bytes(features: ArmFeatures, dim: int, only_sids: bool = False) -> int:
    """Return the bytes of the arm's embedding tables (float32 weights, over all ranks), or of its SID tables alone."""
    tables = features.tables
    return sum(table.rows * dim * 4 for table in tables if table.is_sid or not only_sids)


def local_parts(tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the parts of a tensor that this rank holds, each with its offset in the whole tensor."""
    if not isinstance(tensor, ShardedTensor):
        yield (0,) * tensor.dim(), tensor
        return
    for shard in tensor.local_shards():
        yield tuple(shard.metadata.shard_offsets), shard.tensor


def table_of(name: str) -> str | None:
    """Return the table of a weight or state, from its name in `ShardedRanker.state`; None for the network."""
    _, module, _, table, *_ = name.split(".")
    return table if module in COLLECTIONS else None


def real_bytes(sharded: ShardedRanker, world: World) -> dict[str, list[dict[str, int]]]:
    """Measure the tables' bytes on all ranks, without caches and buffers; every rank must call.

    Returns:
        table -> for each rank that holds a part of it: rank, weight_bytes and state_bytes.
    """
    own: dict[str, dict[str, int]] = {}
    for name, tensor in sharded.state().items():
        table = table_of(name)
        if table is None:
            continue
        kind = "weight_bytes" if name.startswith("model.") else "state_bytes"
        for _, part in local_parts(tensor):
            taken = own.setdefault(table, {"rank": world.rank, "weight_bytes": 0, "state_bytes": 0})
            taken[kind] += part.nbytes
    everyone = gather(world, own)
    names = sorted({table for each in everyone for table in each})
    return {table: [each[table] for each in everyone if table in each] for table in names}


def plan_facts(plan: TablePlan, taken: dict[str, list[dict[str, int]]]) -> dict[str, Any]:
    """Return a summary of a plan: tables by sharding and kernel, and the bytes on the fullest rank.

    Args:
        plan: the plan. taken: see `real_bytes`.
    """
    by_rank = Counter[int]()
    for part in (part for parts in taken.values() for part in parts):
        by_rank[part["rank"]] += part["weight_bytes"] + part["state_bytes"]
    return {
        "tables": dict(Counter(f"{table.sharding}, {table.kernel}" for table in plan.tables)),
        "estimated_rank_bytes": int(plan.rank_bytes().sum(1).max()),
        "real_rank_bytes": max(by_rank.values()),
    }
