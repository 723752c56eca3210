"""Dense features are standardized by moments of the training rows, compared with numpy's over all rows at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sidestack.infra.snapshot import read_dataset
from sidestack.ranker.blocks import MOST_DEVIATIONS, DenseBlock, compressed
from sidestack.ranker.config import ModelConfig
from sidestack.ranker.features import arm_features
from sidestack.ranker.initial import fill_dense
from sidestack.ranker.reader import Split
from sidestack.ranker.scaling import Moments, dense_moments
from tests.datasets import joined
from tests.ranker.dataset import SPEC, write_dataset
from tests.ranker.training import ONE, config_of


def test_moments_of_parts_equal_those_of_all_rows() -> None:
    values_NF = np.random.default_rng(0).normal(1e4, [1e-3, 1, 50], (1000, 3))
    moments = Moments(3)
    for part in np.split(values_NF, [1, 300, 301]):
        moments.add(part)
    assert moments.mean_F == pytest.approx(values_NF.mean(0))
    assert 1 / moments.scale() == pytest.approx([1, *values_NF.std(0)[1:]])  # the first varies too little


def test_a_constant_feature_is_not_scaled() -> None:
    moments = Moments(2)
    moments.add(np.array([[3.0, 0.0], [3.0, 0.0]]))
    assert moments.scale().tolist() == [1, 1]
    assert Moments(1).scale().tolist() == [1]


def test_dense_moments_are_of_the_training_rows(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "dataset", rows_a_day=256)
    dataset = read_dataset(path)
    features = arm_features(dataset.spec, config_of("none"), {})
    moments_2F = dense_moments(Split(SPEC.train, dataset, features), ONE)
    assert moments_2F is not None
    rows = joined(path, None, *SPEC.train)
    values_NF = np.stack([rows[name].to_numpy() for name in SPEC.dense], axis=1)
    log_NF = np.sign(values_NF) * np.log1p(np.abs(values_NF))
    assert moments_2F[0].numpy() == pytest.approx(log_NF.mean(0), rel=1e-5)
    assert 1 / moments_2F[1].numpy() == pytest.approx(log_NF.std(0), rel=1e-5)


def test_a_dataset_without_dense_features_has_no_moments(tmp_path: Path) -> None:
    dataset = read_dataset(write_dataset(tmp_path / "dataset", rows_a_day=256))
    features = arm_features(SPEC.model_copy(update={"dense": ()}), config_of("none"), {})
    assert dense_moments(Split(SPEC.train, dataset, features), ONE) is None


def test_dense_block_receives_standardized_and_clamped_features() -> None:
    model = ModelConfig(embedding_dim=4, dense_outputs=1, dense_hidden=8)
    moments_2F = torch.tensor([[2.0, -1.0], [0.5, 4.0]])
    block, plain = DenseBlock(2, model, moments_2F), DenseBlock(2, model)
    for one in (block, plain):
        fill_dense(one, 0)
    dense_BF = torch.tensor([[0.0, 3.0], [1e30, -1e30], [50.0, -2.0]])
    standard_BF = ((compressed(dense_BF) - moments_2F[0]) * moments_2F[1]).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
    assert torch.equal(block(dense_BF), plain.layers(standard_BF).view(3, 1, 4))
    assert torch.equal(block.state_dict()["moments_2F"], moments_2F)
