"""From a model with tables on the meta device to a sharded model with its optimizers, on gloo and nccl alike."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from infra.distributed import World, together
from infra.errors import ConfigError
from ranker.config import RankerConfig
from ranker.features import ArmFeatures
from ranker.frozen import Frozen
from ranker.initial import fill_dense, fill_table
from ranker.kernels import speed_up_sequences
from ranker.model import Ranker

# What DDP has torch say about tracing, on every rank, is of no use to who runs a stage.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass(frozen=True)
class ShardedRanker:
    """The model over all ranks, with what trains it.

    Attributes:
        model: tables sharded by the plan, the rest data-parallel.
        optimizer: all optimizers as one; the tables' own runs inside the backward pass.
        dense_optimizer: Adam, for everything but the tables.
        plan: table -> how and where it is sharded, ready for JSON.
    """

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    dense_optimizer: KeyedOptimizerWrapper
    plan: dict[str, Any]

    def set_learning_rates(self, sparse: float, dense: float) -> None:
        """Set the learning rates of the tables and of the rest, from the next step on."""
        for group in self.model.fused_optimizer.param_groups:
            group["lr"] = sparse
        for group in self.dense_optimizer.param_groups:
            group["lr"] = dense


def build_sharded(
    features: ArmFeatures, config: RankerConfig, world: World, frozen: Frozen, mean_history: float = 1.0
) -> ShardedRanker:
    """Build the model, plan its tables, shard it, and give every part its initial weights.

    Args:
        features: what the arm reads and looks up. config: the arm's resolved configuration.
        world: the process group; every rank calls.
        frozen: the constants that the arm's content needs.
        mean_history: history entries an event on average, for the planner's estimates.

    Raises:
        ConfigError: the tables do not fit what the planner may use (on rank 0). StageError: the same, elsewhere.
    """
    model = Ranker(features, config, world.device, frozen)
    fill_dense(model.body, config.training.seed)
    for tables in (model.bags, model.sequences):
        settings = {"lr": config.training.sparse_learning_rate, "eps": 1e-8}
        _apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), settings)
    plan = plan_tables(model, features, config, world, mean_history)
    sharded = DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(torch.distributed.GroupMember.WORLD),
        device=world.device,
        plan=plan,
        sharders=_sharders(),
    )
    speed_up_sequences(sharded, world.device)
    fill_tables(sharded, config.training.seed)
    dense_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=config.training.dense_learning_rate, fused=True),
    )
    optimizer = CombinedOptimizer([sharded.fused_optimizer, dense_optimizer])
    return ShardedRanker(sharded, optimizer, dense_optimizer, describe_plan(plan))


def _sharders() -> list[ModuleSharder[nn.Module]]:
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


def plan_tables(
    model: Ranker, features: ArmFeatures, config: RankerConfig, world: World, mean_history: float
) -> ShardingPlan:
    """Let rank 0 plan where each table goes, and tell every rank; a planner's error is raised on all of them.

    torchrec's `collective_plan` alone would leave the other ranks waiting for a plan that never comes.

    Raises:
        ConfigError: on rank 0, naming what the planner may use. StageError: on the other ranks.
    """
    planner = EmbeddingShardingPlanner(
        topology=_topology(config, world),
        batch_size=config.training.batch_size // world.size,
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
        constraints=_constraints(features, config, world, mean_history),
        debug=False,
    )
    plan: ShardingPlan | None = None
    with together(world, "planning the embedding tables"):
        if world.is_main:
            try:
                plan = planner.plan(model, _sharders())
            except PlannerError as error:
                raise ConfigError(_planner_message(error, features, config)) from error
    return invoke_on_rank_and_broadcast_result(torch.distributed.GroupMember.WORLD, 0, lambda: plan)


def _planner_message(error: PlannerError, features: ArmFeatures, config: RankerConfig) -> str:
    need = table_bytes(features, config.model.embedding_dim) / 2**30
    memory = config.sharding.memory_gib
    allowed = "the device's memory" if memory is None else f"memory_gib={memory}"
    reason = " ".join(str(error).split())[:300]
    return (
        f"ranker.sharding: no plan for {need:.3g} GiB of tables with {allowed} a rank and types "
        f"{', '.join(config.sharding.types)}: {reason}"
    )


def _topology(config: RankerConfig, world: World) -> Topology:
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    gib = config.sharding.memory_gib
    capacity = int(gib * 2**30) if gib else _device_memory(world, local_size)
    on_gpu = world.device.type == "cuda"
    return TopologyFactory.create_topology(
        trainer_config=TrainerConfig(
            world_size=world.size,
            local_world_size=local_size,
            hbm_cap_bytes=capacity if on_gpu else None,
            ddr_cap_bytes=None if on_gpu else capacity,
        ),
        hardware_config=HardwareConfig(),
        kernel_config=KernelConfig(compute_device=world.device.type),
    )


def _device_memory(world: World, local_size: int) -> int:
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_size


def _constraints(
    features: ArmFeatures, config: RankerConfig, world: World, mean_history: float
) -> dict[str, ParameterConstraints]:
    # Only kernels whose optimizer runs in the backward pass, the one thing that is the same on CPU and GPU.
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if world.device.type == "cuda":
        kernels += [EmbeddingComputeKernel.FUSED_UVM_CACHING.value]
    lengths = {feature.table: float(feature.ids_per_entry) for feature in features.bags}
    lengths |= {feature.table: mean_history * feature.ids_per_entry for feature in features.sequences}
    return {
        table: ParameterConstraints(
            sharding_types=[ShardingType(name).value for name in config.sharding.types],
            compute_kernels=kernels,
            pooling_factors=[length],
        )
        for table, length in lengths.items()
    }


def fill_tables(model: DistributedModelParallel, seed: int) -> None:
    """Give every shard that this rank holds its initial weights; see `ranker.initial`."""
    for name, table in model.state_dict().items():
        if not isinstance(table, ShardedTensor):
            continue
        for shard in table.local_shards():
            rows_from, columns_from = shard.metadata.shard_offsets
            fill_table(shard.tensor, name, seed, rows_from, columns_from, table.size()[1])


def table_bytes(features: ArmFeatures, dim: int, only_sids: bool = False) -> int:
    """Give the bytes of the arm's embedding tables (float32 weights, over all ranks), or of its SID tables alone."""
    tables = (*features.bags, *features.sequences)
    return sum(table.rows * dim * 4 for table in tables if table.is_sid or not only_sids)


def describe_plan(plan: ShardingPlan) -> dict[str, Any]:
    """Give a plan as plain data: table -> sharding type, kernel, and the place, offset and size of every shard."""
    tables = {}
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for name, parameter in module.items():
            shards = getattr(parameter.sharding_spec, "shards", [])
            tables[name] = {
                "sharding": parameter.sharding_type,
                "kernel": parameter.compute_kernel,
                "shards": [
                    {
                        "placement": str(shard.placement),
                        "offset": list(shard.shard_offsets),
                        "size": list(shard.shard_sizes),
                    }
                    for shard in shards
                ],
            }
    return tables
