"""VQ-fusion: missing signals are masked in input and loss, rows do not touch each other, parts mirror."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from encoder.config import EncoderConfig
from encoder.fusion import VQFusion
from encoder.quantizers import FsqConfig
from encoder.signals import SignalBatch, chosen_signals, signal_batch
from infra.config import parse
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
    for parameter in model.parameters():  # learned nulls start at zero, the value of a masked slot
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


def test_what_lies_under_a_missing_signal_shows_nowhere(model: VQFusion, batch: SignalBatch) -> None:
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
    expected, correct = [], []
    for name, x_hat_BD in zip(SPEC.embeddings, embeddings, strict=True):
        rows = batch.present[name].nonzero().flatten()
        expected.append(sum(1 - functional.cosine_similarity(x_hat_BD[i], batch.embeddings[name][i], 0) for i in rows))
        correct.append(0)
    for name, logits_BC in zip(SPEC.categoricals, logits, strict=True):
        rows = batch.present[name].nonzero().flatten()
        ids = batch.categoricals[name]
        expected.append(sum(-logits_BC[i].log_softmax(0)[ids[i]] for i in rows))
        correct.append(sum(int(logits_BC[i].argmax() == ids[i]) for i in rows))
    torch.testing.assert_close(losses.signal_sums, torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
    assert losses.correct.tolist() == correct
    assert losses.present.tolist() == [int(batch.present[name].sum()) for name in SIGNALS.names]
    weighted = sum(w * e for w, e in zip((1, 1, 0.1, 0.1), expected, strict=True)) / 200
    training = CONFIG.training
    aux = training.codebook_weight * losses.codebook + training.commitment_weight * losses.commitment
    torch.testing.assert_close(losses.total, weighted + aux, rtol=1e-4, atol=1e-4)


def test_a_row_s_code_does_not_depend_on_the_others(model: VQFusion, batch: SignalBatch) -> None:
    h_BH = model.encoder(batch)
    alone_BH = torch.cat([model.encoder(batch.sliced(i, i + 1)) for i in range(96)])
    torch.testing.assert_close(h_BH, alone_BH)


def test_decoder_loss_trains_the_encoder_straight_through(model: VQFusion, batch: SignalBatch) -> None:
    model.codebook_weight = model.commitment_weight = 0.0
    model.train()(batch, 96).total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder.parameters())
    assert all(p.grad.abs().max() > 0 for p in model.decoder.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.quantizer.parameters())


def test_one_signal_and_fsq(batch: SignalBatch) -> None:
    signals = chosen_signals({"brand": 1.0}, SPEC)
    config = CONFIG.model_copy(update={"quantizer": FsqConfig(levels=8, digits=4)})
    model = VQFusion(config, signals)
    assert model.digits(batch).shape == (96, 4)
    assert torch.isfinite(model(batch, 96).total)
