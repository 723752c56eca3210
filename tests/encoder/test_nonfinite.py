"""Diagnosis of a non-finite loss: file, row group and signal, or the gradient if all losses are finite."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.nonfinite import diagnosis
from sidestack.encoder.signals import SignalBatch, signal_batch
from sidestack.infra.parquet import RowGroup
from tests.encoder.fabricated import item_table

ROWS = np.arange(300, 500)
GROUPS = tuple(RowGroup(Path(f"items/{i // 4}.parquet"), i % 4, 90 * i, 90) for i in range(8))


@pytest.fixture
def model(encoder: Path) -> VQFusion:
    return load_bundle(encoder, torch.device("cpu")).model


@pytest.fixture
def batch(model: VQFusion) -> SignalBatch:
    return signal_batch(item_table().take(ROWS), model.signals)


def test_a_row_is_named_by_its_file_and_row_group(model: VQFusion, batch: SignalBatch) -> None:
    batch.embeddings["text_embedding"][105] = torch.nan  # global row 405, in the group of rows 360 to 449
    batch.present["text_embedding"][105] = True
    found = diagnosis(model, batch, ROWS, GROUPS)
    assert found == "items/1.parquet, row group 0, 1 rows from its row 45 on: loss of signal 'text_embedding' is nan"


def test_signal_with_a_non_finite_loss_is_named(model: VQFusion, batch: SignalBatch) -> None:
    with torch.no_grad():
        model.get_parameter("decoder.categoricals.1.1.bias").fill_(-torch.inf)
    found = diagnosis(model, batch, ROWS, GROUPS)
    assert found.startswith("items/0.parquet, row group 3, 60 rows from its row 30 on: loss of signal 'brand' is nan; ")
    assert found.count("loss of signal 'brand'") == 3  # rows 300 to 499 lie in three row groups


def test_non_finite_latent_vectors_are_named_instead_of_losses(model: VQFusion, batch: SignalBatch) -> None:
    with torch.no_grad():
        model.get_parameter("encoder.categoricals.0.table.weight")[3] = torch.inf
    found = diagnosis(model, batch, ROWS, GROUPS)
    assert "latent vectors are not finite" in found
    assert "loss" not in found


def test_non_finite_gradient_is_named_when_all_losses_are_finite(model: VQFusion, batch: SignalBatch) -> None:
    weight = model.get_parameter("encoder.embeddings.0.project.weight")
    weight.grad = torch.full_like(weight, torch.inf)
    found = diagnosis(model, batch, ROWS, GROUPS)
    assert "the gradient of encoder.embeddings.0.project.weight is not" in found
    assert "items/1.parquet, row group 0" in found


def test_long_list_of_row_groups_is_truncated(model: VQFusion) -> None:
    table = item_table()
    batch = signal_batch(table, model.signals)
    batch.embeddings["text_embedding"].fill_(torch.nan)
    batch.present["text_embedding"].fill_(True)
    found = diagnosis(model, batch, np.arange(len(table)), GROUPS)
    assert found.count("row group ") == 4
    assert found.endswith("; and in 4 more row groups")
