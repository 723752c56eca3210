"""Encoding by search: never worse than rounding, equal to a loop over rows, exhaustive for a single digit."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sidestack.encoder.config import EncoderConfig, SearchConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalBatch, chosen_signals, signal_batch
from sidestack.infra.config import parse
from tests.encoder.fabricated import ENCODER, SPEC, item_table, merged

SIGNALS = chosen_signals({}, SPEC)
QUANTIZERS = {
    "dpca": {"kind": "structured", "groups": 2, "depth": 3, "group_dim": 4},
    "lines": {"kind": "structured", "lines": 8, "levels": 2, "groups": 1, "depth": 2, "group_dim": 6},
    "fsq": {"kind": "fsq", "digits": 6, "bound": "tanh"},
}


@pytest.fixture
def batch() -> SignalBatch:
    return signal_batch(item_table().slice(0, 40), SIGNALS)


def model_of(quantizer: dict[str, object], batch: SignalBatch, **search: int) -> VQFusion:
    torch.manual_seed(0)
    config = parse(EncoderConfig, merged({**ENCODER, "quantizer": quantizer}, {"search": search}), "encoder")
    model = VQFusion(config, SIGNALS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.quantizer.start(model.encoder(batch), torch.Generator().manual_seed(0))
    return model


def loss_of(model: VQFusion, batch: SignalBatch, digits_BN: Tensor) -> Tensor:
    return model.weights_K @ model.row_losses(batch, model.reconstruct(digits_BN))


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS.keys())
@torch.no_grad()
def test_search_is_never_worse_and_mostly_better_than_rounding(quantizer: dict, batch: SignalBatch) -> None:
    model = model_of(quantizer, batch)
    h_BH = model.encoder(batch)
    rounded_BN = model.quantizer.encode(h_BH)
    before_B = loss_of(model, batch, rounded_BN)
    last_B = before_B
    for rounds in (1, 2):
        config = SearchConfig(rounds=rounds)
        digits_BN, loss_B = model.refine_digits(batch, h_BH, rounded_BN, config)
        torch.testing.assert_close(loss_B, loss_of(model, batch, digits_BN))
        assert bool((loss_B <= last_B + 1e-6).all())
        last_B = loss_B
    assert (last_B < before_B - 1e-4).float().mean() > 0.5


@torch.no_grad()
def test_search_equals_a_loop_over_rows_and_values(batch: SignalBatch) -> None:
    model = model_of(QUANTIZERS["dpca"], batch)
    h_BH = model.encoder(batch)
    start_BN = model.quantizer.encode(h_BH)
    found_BN, _ = model.refine_digits(batch, h_BH, start_BN, SearchConfig(rounds=2))
    for row in range(0, len(batch), 7):
        item = batch.sliced(row, row + 1)
        digits = start_BN[row].clone()
        for _ in range(2):
            for n in range(len(digits)):
                tried_VN = digits.repeat(3, 1)
                tried_VN[:, n] = torch.arange(3)
                losses = [float(loss_of(model, item, tried_N[None])) for tried_N in tried_VN]
                best = min(range(3), key=losses.__getitem__)
                if losses[best] < losses[int(digits[n])] - 1e-7:
                    digits[n] = best
        assert digits.tolist() == found_BN[row].tolist()


@torch.no_grad()
def test_search_over_all_values_of_a_single_digit_finds_the_least_loss(batch: SignalBatch) -> None:
    one_digit = {"kind": "structured", "lines": 8, "levels": 2, "groups": 1, "depth": 1, "group_dim": 6}
    model = model_of(one_digit, batch)
    h_BH = model.encoder(batch)
    _, loss_B = model.refine_digits(batch, h_BH, model.quantizer.encode(h_BH), SearchConfig(rounds=1, candidates=16))
    every = [loss_of(model, batch, torch.full((len(batch), 1), value)) for value in range(16)]
    torch.testing.assert_close(loss_B, torch.stack(every).amin(0))


@torch.no_grad()
def test_candidates_are_the_nearest_codewords(batch: SignalBatch) -> None:
    """With one candidate per digit, only the codeword nearest to h minus the other codewords may be taken."""
    model = model_of(QUANTIZERS["lines"], batch)
    h_BH = model.encoder(batch)
    start_BN = model.quantizer.encode(h_BH)
    found_BN, _ = model.refine_digits(batch, h_BH, start_BN, SearchConfig(rounds=1, candidates=1))
    table_NRH = model.quantizer.codewords()
    rest_BH = h_BH - table_NRH[1, start_BN[:, 1]]
    nearest_B = torch.cdist(rest_BH, table_NRH[0]).argmin(-1)
    changed_B = found_BN[:, 0] != start_BN[:, 0]
    assert torch.equal(found_BN[changed_B, 0], nearest_B[changed_B])


@torch.no_grad()
def test_digits_are_searched_only_when_configured(batch: SignalBatch) -> None:
    plain, searching = model_of(QUANTIZERS["dpca"], batch), model_of(QUANTIZERS["dpca"], batch, rounds=2)
    rounded_BN = plain.quantizer.encode(plain.encoder(batch))
    assert torch.equal(plain.digits(batch), rounded_BN)
    expected_BN, _ = plain.refine_digits(batch, plain.encoder(batch), rounded_BN, SearchConfig(rounds=2))
    assert torch.equal(searching.digits(batch), expected_BN)
    assert not torch.equal(expected_BN, rounded_BN)


def test_search_is_refused_when_only_one_digit_is_decoded() -> None:
    quantizer = {"kind": "topk_kmeans", "clusters": 16, "k": 3, "latent_dim": 8}
    EncoderConfig.model_validate({"quantizer": quantizer})
    with pytest.raises(ValidationError, match="nothing to search"):
        EncoderConfig.model_validate({"quantizer": quantizer, "search": {"rounds": 1}})
