"""The bag-wise sequence lookup, compared with fbgemm's own unpooled one."""

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec import KeyedJaggedTensor

from sidestack.ranker.cpu_sequence_lookup import BagsOfOne

TABLES, ROWS, DIM = 3, 20, 8


class Kernel:
    """The part of torchrec's kernel that `BagsOfOne` uses."""

    def __init__(self) -> None:
        self.emb_module = SplitTableBatchedEmbeddingBagsCodegen(
            [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)] * TABLES,
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, pooling_mode=PoolingMode.NONE, learning_rate=0.1,
        )  # fmt: skip
        for table, weight in enumerate(self.emb_module.split_embedding_weights()):
            weight.copy_(torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(table)))

    def unpooled(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.emb_module(features.values(), features.offsets().long())


def sequences(lengths: list[list[int]], seed: int) -> KeyedJaggedTensor:
    flat = torch.tensor(lengths).flatten()
    values = torch.randint(0, ROWS, (int(flat.sum()),), generator=torch.Generator().manual_seed(seed))
    return KeyedJaggedTensor(keys=["a", "b", "c"], values=values, lengths=flat)


def test_bagwise_lookup_trains_the_same_weights_as_the_unpooled_kernel() -> None:
    plain, fast = Kernel(), Kernel()
    bags = BagsOfOne(fast)
    # Features are unequal or empty, because a row-wise shard may get any number of a feature's ids.
    for step, lengths in enumerate([[[3, 0], [1, 1], [9, 4]], [[0, 0], [2, 5], [0, 1]], [[0, 0]] * 3]):
        features = sequences(lengths, step)
        expected, found = plain.unpooled(features), bags(features)
        torch.testing.assert_close(found, expected)
        weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
        (expected * weight).sum().backward()
        (found * weight).sum().backward()
    for expected, found in zip(
        plain.emb_module.split_embedding_weights(), fast.emb_module.split_embedding_weights(), strict=True
    ):
        torch.testing.assert_close(found, expected)
    states = zip(plain.emb_module.split_optimizer_states(), fast.emb_module.split_optimizer_states(), strict=True)
    for expected_state, found_state in states:
        torch.testing.assert_close(found_state[0], expected_state[0])
