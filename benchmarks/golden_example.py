"""torchrec's golden training example, as in its repository, on the tables and batches of one of our arms.

From examples/golden_training/train_dlrm.py of pytorch/torchrec at a48cef7: DLRM, RowWiseAdagrad in the backward pass,
default sharders and planner, Adagrad for the rest, TrainPipelineSparseDist. Only tables, widths, learning rate and data
differ.
"""

from typing import Any

import torch
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import TrainPipelineSparseDist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from sidestack.benchmarks.trial import config_of
from sidestack.infra.distributed import World
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.config import ModelConfig, TrainingConfig
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.initial import fill_dense
from sidestack.ranker.model import Ranker
from sidestack.ranker.planner import sharders
from sidestack.ranker.sharding import shard

LEARNING_RATE = 0.01
"""A tenth of the example's rate, at which losses rise at first on these rows; speed does not depend on it."""


def golden_dlrm(features: ArmFeatures, model: ModelConfig, device: torch.device) -> DLRMTrain:
    """Return DLRM over an arm's tables, with the history as bags, and dense layers as wide as ours."""
    dim = model.embedding_dim
    tables = [
        EmbeddingBagConfig(
            name=f"t_{feature.column}",
            embedding_dim=dim,
            num_embeddings=feature.rows,
            feature_names=[feature.column],
        )
        for feature in (*features.bags, *features.sequences)
    ]
    dlrm = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=len(features.dense),
        dense_arch_layer_sizes=[model.dense_hidden, dim],
        over_arch_layer_sizes=[*model.over_arch, model.tower_hidden, 1],
        dense_device=device,
    )
    train_model = DLRMTrain(dlrm)
    _apply_optimizer_in_backward(RowWiseAdagrad, train_model.model.sparse_arch.parameters(), {"lr": LEARNING_RATE})
    return train_model


def our_network(features: ArmFeatures, arm: str, device: torch.device) -> Ranker:
    """Return the network of an arm without constants, prepared as in the example."""
    model = Ranker(features, config_of(arm), device, ModelConstants())
    fill_dense(model.body, seed=0)
    for tables in model.collections:
        _apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": LEARNING_RATE})
    return model


def golden_pipeline(train_model: DLRMTrain | Ranker, device: torch.device) -> TrainPipelineSparseDist[Any, Any]:
    """Shard a model and return its pipeline, as the example does."""
    model = DistributedModelParallel(module=train_model, device=device)
    non_fused_optimizer = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda params: torch.optim.Adagrad(params, lr=LEARNING_RATE),
    )
    return TrainPipelineSparseDist(model, non_fused_optimizer, device)


def our_pipeline(train_model: DLRMTrain, world: World) -> TrainPipelineSparseDist[Any, Any]:
    """Shard the example's model and return its pipeline, as the ranker's training does."""
    topology = Topology(world_size=world.size, compute_device=world.device.type)
    plan = EmbeddingShardingPlanner(topology=topology).plan(train_model, sharders())
    model, dense_optimizer = shard(train_model, plan, TrainingConfig(dense_learning_rate=LEARNING_RATE), world)
    optimizer = CombinedOptimizer([model.fused_optimizer, dense_optimizer])
    return TrainPipelineSparseDist(model, optimizer, world.device)


def golden_batch(batch: RankerBatch, features: ArmFeatures) -> Batch:
    """Convert a batch to the example's format: the history as one more feature, the click as the label.

    A request's features are repeated for each of its rows.
    """
    parts = {**batch.request_bags.to_dict(), **batch.bags.to_dict(), **batch.sequences.to_dict()}
    requests = batch.request_B.tolist()
    keys = [feature.column for feature in (*features.bags, *features.sequences)]
    rows = {name: parts[name].to_dense() for name in keys}
    rows |= {
        feature.column: [rows[feature.column][request] for request in requests]
        for feature in (*features.request_bags, *features.sequences)
    }
    sparse = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([ids for name in keys for ids in rows[name]]),
        lengths=torch.tensor([len(ids) for name in keys for ids in rows[name]], dtype=torch.int32),
    )
    return Batch(dense_features=batch.dense_BF, sparse_features=sparse, labels=batch.labels_BT[:, 0])
