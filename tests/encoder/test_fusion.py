"""VQ-fusion: masks for missing signals, losses, independence of rows, the linear start, and signal dropout."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.quantizers import FsqConfig
from sidestack.encoder.signals import SignalBatch, chosen_signals, signal_batch
from sidestack.infra.config import parse
from tests.encoder.fabricated import ENCODER, SPEC, item_table

SIGNALS = chosen_signals({}, SPEC)
CONFIG = parse(EncoderConfig, ENCODER, "encoder")


@pytest.fixture
def batch() -> SignalBatch:
    return signal_batch(item_table().slice(0, 96), SIGNALS)


@pytest.fixture
def model(batch: SignalBatch) -> VQFusion:
    torch.manual_seed(0)
    model = VQFusion(CONFIG, SIGNALS).eval()
    for parameter in model.parameters():  # learned nulls start at zero, which equals a masked slot
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model.quantizer.start(model.encoder(batch), torch.Generator().manual_seed(0))
    return model


def with_garbage_where_missing(batch: SignalBatch) -> SignalBatch:
    def spoiled(name: str, x: Tensor, garbage: float) -> Tensor:
        present = batch.present[name]
        return torch.where(present.view(-1, *[1] * (x.ndim - 1)), x, torch.full_like(x, garbage))

    return SignalBatch(
        {name: spoiled(name, x, 7.0) for name, x in batch.embeddings.items()},
        {name: spoiled(name, x, 1) for name, x in batch.categoricals.items()},
        batch.present,
    )


def test_values_of_missing_signals_have_no_effect(model: VQFusion, batch: SignalBatch) -> None:
    assert all(not present.all() for present in batch.present.values())
    other = with_garbage_where_missing(batch)
    assert torch.equal(model.encoder(batch), model.encoder(other))
    assert torch.equal(model(batch, 96).total, model(other, 96).total)


def test_missing_is_not_the_same_as_zero(model: VQFusion, batch: SignalBatch) -> None:
    everything = SignalBatch(
        batch.embeddings, batch.categoricals, {name: torch.ones_like(p) for name, p in batch.present.items()}
    )
    h_BH, other_BH = model.encoder(batch), model.encoder(everything)
    complete_B = torch.stack(list(batch.present.values())).all(0)
    assert torch.equal(h_BH[complete_B], other_BH[complete_B])
    assert bool((h_BH[~complete_B] != other_BH[~complete_B]).any(-1).all())


def test_losses_are_cosine_and_cross_entropy_over_present_rows(model: VQFusion, batch: SignalBatch) -> None:
    losses = model(batch, 200)
    embeddings, logits = model.decoder(model.quantizer(model.encoder(batch)).straight_through)
    expected = []
    for name, x_hat_BD in zip(SPEC.embeddings, embeddings, strict=True):
        rows = batch.present[name].nonzero().flatten()
        cosines = [functional.cosine_similarity(x_hat_BD[i], batch.embeddings[name][i], 0) for i in rows]
        expected.append((1 - torch.stack(cosines)).sum())
    for name, logits_BC in zip(SPEC.categoricals, logits, strict=True):
        rows = batch.present[name].nonzero().flatten()
        ids = batch.categoricals[name]
        expected.append(-torch.stack([logits_BC[i].log_softmax(0)[ids[i]] for i in rows]).sum())
    torch.testing.assert_close(losses.signal_sums, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
    assert losses.present.tolist() == [int(batch.present[name].sum()) for name in SIGNALS.names]
    weighted = sum(w * e for w, e in zip((1, 1, 0.1, 0.1), expected, strict=True)) / 200
    training = CONFIG.training
    aux = training.codebook_weight * losses.codebook + training.commitment_weight * losses.commitment
    torch.testing.assert_close(losses.total, weighted + aux, rtol=1e-4, atol=1e-4)


def test_latent_of_a_row_does_not_depend_on_other_rows(model: VQFusion, batch: SignalBatch) -> None:
    h_BH = model.encoder(batch)
    alone_BH = torch.cat([model.encoder(batch.sliced(i, i + 1)) for i in range(96)])
    torch.testing.assert_close(h_BH, alone_BH)


def test_decoder_loss_trains_the_encoder_straight_through(model: VQFusion, batch: SignalBatch) -> None:
    model.codebook_weight = model.commitment_weight = 0.0
    model.train()(batch, 96).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.quantizer.parameters())


def test_model_with_one_signal_and_fsq_encodes_a_batch(batch: SignalBatch) -> None:
    signals = chosen_signals({"brand": 1.0}, SPEC)
    config = CONFIG.model_copy(update={"quantizer": FsqConfig(levels=8, digits=4)})
    model = VQFusion(config, signals)
    assert model.digits(batch).shape == (96, 4)
    assert torch.isfinite(model(batch, 96).total)


def test_linear_path_starts_as_a_principal_component_analysis(batch: SignalBatch) -> None:
    """With as many axes as dimensions and no quantization, the untrained network reconstructs every embedding."""
    torch.manual_seed(0)
    dims = sum(SIGNALS.embeddings.values())
    wide = {**ENCODER, "quantizer": {"kind": "structured", "groups": 1, "depth": 1, "group_dim": dims}}
    model = VQFusion(parse(EncoderConfig, wide, "encoder"), SIGNALS).eval()
    with torch.no_grad():
        model.start_linear(model.weighted_units(batch))
        h_BH = model.encoder(batch)
        losses_KB = model.row_losses(batch, model.decoder(h_BH))[: len(SIGNALS.embeddings)]
    assert losses_KB.max() < 1e-5
    variances_H = h_BH.var(0)
    assert bool((variances_H[:-1] >= variances_H[1:] - 1e-6).all())
    torch.testing.assert_close(h_BH.mean(0), torch.zeros(dims), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "quantizer", [{"kind": "fsq", "digits": 4}, {"kind": "structured", "groups": 2, "group_dim": 2}]
)
def test_axes_are_distributed_over_blocks_and_scaled_to_fixed_levels(quantizer: dict, batch: SignalBatch) -> None:
    torch.manual_seed(0)
    model = VQFusion(parse(EncoderConfig, {**ENCODER, "quantizer": quantizer}, "encoder"), SIGNALS).eval()
    with torch.no_grad():
        x_ND = model.weighted_units(batch)
        model.start_linear(x_ND)
        spread_H = model.encoder(batch).std(0, correction=0)
    singular = torch.linalg.svdvals(x_ND - x_ND.mean(0))[:4] / len(batch) ** 0.5
    wanted = model.quantizer.latent_spread
    expected_H = singular[[0, 2, 1, 3]] if wanted is None else torch.full((4,), wanted)
    torch.testing.assert_close(spread_H, expected_H, rtol=1e-3, atol=1e-5)


def test_signal_dropout_hides_some_signals_of_some_rows_and_never_all(model: VQFusion, batch: SignalBatch) -> None:
    model.signal_dropout = 0.5
    assert model._hide_signals(batch) is batch, "nothing is hidden in evaluation"
    model.train()
    torch.manual_seed(3)
    seen = model._hide_signals(batch)
    hidden_KB = torch.stack([batch.present[name] & ~seen.present[name] for name in SIGNALS.names])
    assert all(bool((seen.present[name] <= batch.present[name]).all()) for name in SIGNALS.names)
    assert torch.equal(seen.any_present, batch.any_present)
    assert 0.3 < hidden_KB.any(0).float().mean() < 0.6  # half of the rows, less those that keep all signals by chance
    torch.manual_seed(3)
    losses = model(batch, len(batch))
    torch.manual_seed(3)
    assert torch.equal(losses.present, torch.stack([batch.present[name].sum() for name in SIGNALS.names]))
    s_BH = model.quantizer(model.encoder(model._hide_signals(batch))).straight_through
    sums_K = model.row_losses(batch, model.decoder(s_BH)).sum(1)
    torch.testing.assert_close(losses.signal_sums, sums_K.detach())
