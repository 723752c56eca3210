"""Placement of every embedding table by torchrec's planner, in the same way for a training and for a dry run.

A training plans for the ranks it runs on (`ranker.sharding`), a dry run for hypothetical ranks (`ranker.plan`).
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.config import RankerConfig, ShardingConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.model import Ranker

RESERVED_SHARE = 0.15
"""Share of a GPU's memory that tables leave free, for the network, activations and batches."""
GIB = 2**30


class NoPlanError(ConfigError):
    """The tables do not fit; the message names the missing memory, by kind."""


@dataclass(frozen=True)
class Cluster:
    """The ranks that tables are planned for.

    Attributes:
        device: `cuda` or `cpu`. ranks: how many. ranks_per_node: how many share a host.
        device_bytes: memory of a rank's GPU; 0 without one. host_bytes: a rank's share of its host's memory.
    """

    device: str
    ranks: int
    ranks_per_node: int
    device_bytes: int
    host_bytes: int

    @classmethod
    def of(cls, world: World, sharding: ShardingConfig) -> "Cluster":
        """Return the ranks of this process group; `memory_gib` overrides the memory for a rank's tables."""
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_node
        given = int(sharding.memory_gib * GIB) if sharding.memory_gib else None
        if world.device.type != "cuda":
            return cls("cpu", world.size, per_node, 0, given or host)
        own = given or int(torch.cuda.get_device_properties(world.device).total_memory)
        return cls("cuda", world.size, per_node, own, host)

    @property
    def topology(self) -> Topology:
        """Return the cluster as torchrec's `Topology`."""
        return TopologyFactory.create_topology(
            trainer_config=TrainerConfig(
                world_size=self.ranks,
                local_world_size=self.ranks_per_node,
                hbm_cap_bytes=self.device_bytes if self.device == "cuda" else None,
                ddr_cap_bytes=self.host_bytes,
            ),
            hardware_config=HardwareConfig(),
            kernel_config=KernelConfig(compute_device=self.device),
        )


@dataclass(frozen=True)
class PlannedShard:
    """One part of a table.

    Attributes:
        rank: the rank that holds it. offset: its first row and column in the table. size: its rows and columns.
        device_bytes, host_bytes: the planner's memory estimate, with optimizer state, caches and buffers.
    """

    rank: int
    offset: tuple[int, int]
    size: tuple[int, int]
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class PlannedTable:
    """One table's placement.

    Attributes:
        name: the table's. rows, dim: its shape, float32.
        lookups: of a rank per step, one per row or one per request of the batch. ids: mean ids per lookup.
        is_pooled: whether a lookup's ids become one vector. sharding, kernel: torchrec's names of them.
        shards: its parts.
    """

    name: str
    rows: int
    dim: int
    lookups: int
    ids: float
    is_pooled: bool
    sharding: str
    kernel: str
    shards: tuple[PlannedShard, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the weights and of RowWiseAdagrad's one number per row, over all ranks."""
        return self.rows * (self.dim + 1) * 4


@dataclass(frozen=True)
class TablePlan:
    """The planner's result, with its inputs.

    Attributes:
        cluster: the ranks. batch_size: rows of a rank's part of a global batch.
        constraints: table -> the planner's constraints for it. tables: the placement of each.
        sharding: the plan in torchrec's form.
    """

    cluster: Cluster
    batch_size: int
    constraints: dict[str, ParameterConstraints]
    tables: tuple[PlannedTable, ...]
    sharding: ShardingPlan

    def rank_bytes(self) -> npt.NDArray[np.int64]:
        """Return the planner's estimate of the tables' memory on every rank: GPU and host bytes, int64 [ranks, 2]."""
        bytes_R2 = np.zeros((self.cluster.ranks, 2), np.int64)
        for shard in (shard for table in self.tables for shard in table.shards):
            bytes_R2[shard.rank] += (shard.device_bytes, shard.host_bytes)
        return bytes_R2

    def describe(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        constraints = {
            name: {
                "sharding_types": c.sharding_types,
                "kernels": c.compute_kernels,
                "lookups": c.batch_sizes[0],
                "ids": c.pooling_factors[0],
            }
            for name, c in self.constraints.items()
        }
        return {
            "cluster": asdict(self.cluster),
            "batch_size_per_rank": self.batch_size,
            "reserved_share": RESERVED_SHARE if self.cluster.device == "cuda" else 0.0,
            "constraints": constraints,
            "estimated_rank_bytes": [{"device": int(d), "host": int(h)} for d, h in self.rank_bytes()],
            "tables": {table.name: asdict(table) for table in self.tables},
        }


def unsharded_model(
    features: ArmFeatures, config: RankerConfig, device: torch.device, constants: ModelConstants
) -> Ranker:
    """Return the model with its tables on the meta device, each with the optimizer of its backward pass."""
    model = Ranker(features, config, device, constants)
    for tables in model.collections:
        settings = {"lr": config.training.sparse_learning_rate, "eps": 1e-8}
        _apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), settings)
    return model


def sharders() -> list[ModuleSharder[nn.Module]]:
    """Return the sharders of the model's table collections."""
    return [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


class Traffic(NamedTuple):
    """Average lookups of a batch.

    Attributes:
        history: entries per history. requests: requests per row; shared inputs are looked up once per request.
    """

    history: float = 1.0
    requests: float = 1.0


def plan_tables(
    model: Ranker, features: ArmFeatures, config: DecidedConfig, cluster: Cluster, traffic: Traffic
) -> TablePlan:
    """Plan the placement of each table, without a process group or a GPU.

    Args:
        model: see `unsharded_model`. features: what it reads and looks up. config: the arm's.
        cluster: the ranks. traffic: for the planner's estimates.

    Raises:
        NoPlanError: the tables do not fit. ConfigError: no configured sharding type is possible for a table.
    """
    batch_size = config.training.batch_size // cluster.ranks
    limits = _constraints(features, config, cluster, batch_size, traffic)
    topology = cluster.topology
    enumerator = _OrderedEnumerator(topology, batch_size, limits)
    reservation = FixedPercentageStorageReservation(RESERVED_SHARE)
    chosen: list[ShardingOption] = []
    planner = EmbeddingShardingPlanner(
        topology, batch_size, enumerator, reservation, stats=[], constraints=limits, debug=False,
        callbacks=[lambda options: chosen.extend(options) or options],  # type: ignore[func-returns-value]
    )  # fmt: skip
    options = _options(enumerator, model, config, cluster)
    try:
        sharding = planner.plan(model, sharders())
    except PlannerError as error:
        room = reservation.last_reserved_topology.devices[0].storage
        shortage = _shortage(options, cluster, (room.hbm, room.ddr), config)
        reason = " ".join(str(error).rsplit("Last planner error:", 1)[-1].split())
        raise NoPlanError("\n".join([*shortage, f"  torchrec: {reason[:300]}"])) from error
    planned = tuple(_planned_table(option, limits[option.name].batch_sizes[0]) for option in chosen)
    return TablePlan(cluster, batch_size, limits, planned, sharding)


class _OrderedEnumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """torchrec's enumerator with its options sorted. torchrec takes them from a `set` of strings, in another order in
    every process; among equally good plans, the choice would vary."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        place = {option.name: number for number, option in reversed(list(enumerate(options)))}
        return sorted(options, key=lambda option: (place[option.name], option.sharding_type, option.compute_kernel))


def _options(
    enumerator: EmbeddingEnumerator, model: Ranker, config: RankerConfig, cluster: Cluster
) -> list[ShardingOption]:
    try:
        options: list[ShardingOption] = enumerator.enumerate(model, sharders())
    except RuntimeError as error:
        types = ", ".join(config.sharding.types)
        raise ConfigError(f"ranker.sharding.types: {types}: not on {cluster.device}: {error}") from error
    return options


def _planned_table(option: ShardingOption, lookups: int) -> PlannedTable:
    rows, dim = option.tensor.shape
    shards = tuple(
        PlannedShard(shard.rank, tuple(shard.offset), tuple(shard.size), shard.storage.hbm, shard.storage.ddr)
        for shard in option.shards
    )
    return PlannedTable(
        option.name, rows, dim, lookups, option.input_lengths[0], option.is_pooled, option.sharding_type,
        option.compute_kernel, shards,
    )  # fmt: skip


def _constraints(
    features: ArmFeatures, config: RankerConfig, cluster: Cluster, batch_size: int, traffic: Traffic
) -> dict[str, ParameterConstraints]:
    # Only kernels whose optimizer runs in the backward pass: they train the same on CPU and GPU.
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if cluster.device == "cuda":
        kernels += [EmbeddingComputeKernel.FUSED_UVM_CACHING.value]
    entries = dict.fromkeys(features.bags, 1.0) | dict.fromkeys(features.sequences, traffic.history)
    return {
        feature.table: ParameterConstraints(
            sharding_types=[ShardingType(name).value for name in config.sharding.types],
            compute_kernels=kernels,
            pooling_factors=[number * feature.ids_per_entry],
            batch_sizes=[max(1, round(batch_size * traffic.requests)) if feature.of_request else batch_size],
        )
        for feature, number in entries.items()
    }


def _shortage(
    options: Sequence[ShardingOption], cluster: Cluster, room: tuple[int, int], config: RankerConfig
) -> list[str]:
    """Return message lines with the missing memory, for each kernel possible for the tables."""
    tables = {option.name: option.tensor.numel() * 4 for option in options}
    types = ", ".join(config.sharding.types)
    memory = config.sharding.memory_gib
    given = "" if memory is None else f" with memory_gib={memory}"
    lines = [f"ranker.sharding: no plan for {_gib(sum(tables.values()))} of tables on {cluster.ranks} ranks{given}:"]
    for kernel in sorted({option.compute_kernel for option in options}):
        lines.append(f"  {kernel}: {_need([o for o in options if o.compute_kernel == kernel], cluster, room)}")
    hints = (
        "  ranker.model.table_rows gives id tables fewer rows, an arm's max_rows those of SIDs: ids are then hashed",
        "  ranker.model.admission bounds an id table and leaves frequent ids rows of their own",
    )
    return [*lines, *(f"  {line}" for line in _too_large(options, room, types)), *hints]


def _need(options: Sequence[ShardingOption], cluster: Cluster, room: tuple[int, int]) -> str:
    least: dict[str, tuple[int, int]] = {}
    for option in options:
        storage = option.total_storage
        least[option.name] = min(least.get(option.name, (storage.hbm, storage.ddr)), (storage.hbm, storage.ddr))
    parts = []
    for kind, number in (("GPU", 0), ("host", 1)):
        need, have = sum(each[number] for each in least.values()), cluster.ranks * room[number]
        if need:
            verdict = f"short by {_gib(need - have)}" if need > have else "enough in sum"
            parts.append(f"needs {_gib(need)} of {kind} memory, the ranks may fill {_gib(have)}: {verdict}")
    return "; ".join(parts)


def _too_large(options: Sequence[ShardingOption], room: tuple[int, int], types: str) -> list[str]:
    """Return a line for each table whose largest part is too large even for an otherwise empty rank."""
    excess: dict[str, list[int]] = {}
    for option in options:
        over = [max(shard.storage.hbm - room[0], shard.storage.ddr - room[1]) for shard in option.shards]
        excess.setdefault(option.name, []).append(max(over))
    return [
        f"{name}: its largest part is {_gib(min(over))} more than one rank may fill, under {types}"
        for name, over in excess.items()
        if min(over) > 0
    ]


def _gib(number: float) -> str:
    return f"{number / GIB:,.3g} GiB" if number < 1000 * GIB else f"{number / GIB:,.0f} GiB"
