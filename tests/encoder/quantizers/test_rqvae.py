"""RQ-VAE: moving averages, revival, and refused settings."""

import pytest
import torch

from sidestack.encoder.quantizers import RqVaeConfig
from sidestack.encoder.quantizers.rqvae import RqVae
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError
from tests.encoder.quantizers.kinds import started, vectors
from tests.encoder.quantizers.worlds import ALONE


def test_moving_averages_match_hand_computed_values() -> None:
    config = RqVaeConfig(codes=2, depth=2, group_dim=1, update="ema", ema_decay=0.75)
    quantizer = config.build().train()
    with torch.no_grad():
        quantizer.codebook_DPRM.copy_(torch.tensor([[0.0, 10.0], [-1.0, 1.0]]).view(2, 1, 2, 1))
        quantizer.average_sum_DPRM.copy_(quantizer.codebook_DPRM)
    quantized = quantizer(torch.tensor([[1.5], [2.5], [9.0]]))
    assert quantized.digits.tolist() == [[0, 1], [0, 1], [1, 0]]
    before = quantizer.codebook_DPRM.clone()
    quantizer(torch.tensor([[12.0]]))  # a second forward before the step adds to the sums
    assert torch.equal(quantizer.codebook_DPRM, before)  # only after_step changes the codebook
    quantizer.after_step(ALONE)
    # Layer 1: code 0 takes 1.5 and 2.5, code 1 takes 9 and 12. Layer 2 gets 1.5, 2.5, 2 (code 1) and -1 (code 0).
    expected = [0.25 * 4 / (0.75 + 0.25 * 2), (7.5 + 0.25 * 21) / 1.25, -1.0, (0.75 + 0.25 * 6) / (0.75 + 0.25 * 3)]
    assert quantizer.codebook_DPRM.flatten().tolist() == pytest.approx(expected)
    assert not quantizer.codebook_DPRM.requires_grad


def test_unused_code_keeps_its_value() -> None:
    quantizer = RqVaeConfig(codes=2, depth=1, group_dim=1, update="ema", ema_decay=0.1).build().train()
    quantizer.start(torch.tensor([[0.0], [0.1], [100.0], [100.1]]), torch.Generator().manual_seed(0))
    far = int(quantizer.codebook_DPRM.flatten().argmax())
    for _ in range(100):
        quantizer(torch.zeros(4, 1))
        quantizer.after_step(ALONE)
    found = quantizer.codebook_DPRM.flatten().detach()
    assert found[far] == pytest.approx(100.05, rel=1e-4)
    assert found[1 - far] == pytest.approx(0, abs=1e-6)


def test_moving_averages_follow_a_shifted_distribution() -> None:
    quantizer, h_BH = started("rqvae_ema", ema_decay=0.9)
    quantizer.train()
    moved_BH = 1.5 * h_BH + 1.0
    stale = float((moved_BH - quantizer.decode(quantizer.encode(moved_BH))).square().mean())
    for step in range(60):
        quantizer(1.5 * vectors(256, seed=step) + 1.0)
        quantizer.after_step(ALONE)
    fresh = float((moved_BH - quantizer.decode(quantizer.encode(moved_BH))).square().mean())
    assert fresh < 0.5 * stale


def test_revived_code_restarts_its_moving_average() -> None:
    quantizer, h_BH = started("rqvae_ema")
    assert isinstance(quantizer, RqVae)
    quantizer.codebook_DPRM[1, 0, 5] = 1e3
    quantizer.average_count_DPR.fill_(7.0)
    assert quantizer.revive(h_BH, torch.Generator().manual_seed(0)) >= 1
    assert quantizer.average_count_DPR[1, 0, 5] == 1
    assert torch.equal(quantizer.average_sum_DPRM[1, 0, 5], quantizer.codebook_DPRM[1, 0, 5])
    assert float(quantizer.codebook_DPRM.abs().max()) < 10
    assert quantizer.average_count_DPR[0, 0, 0] == 7


def test_revival_replaces_one_code_per_row_when_dead_codes_outnumber_rows() -> None:
    quantizer, h_BH = started("rqvae")
    assert isinstance(quantizer, RqVae)
    with torch.no_grad():
        quantizer.codebook_DPRM[0, :, 1:] = 1e3
    before = quantizer.codebook_DPRM.clone()
    revived = quantizer.revive(h_BH[:5], torch.Generator().manual_seed(0))
    assert revived == int((quantizer.codebook_DPRM != before).any(-1).sum())
    assert bool(quantizer.codebook_DPRM.isfinite().all())
    assert int((quantizer.codebook_DPRM[0] == 1e3).all(-1).sum()) == 2 * 10


@pytest.mark.parametrize(
    ("settings", "rule"),
    [({"codes": 1}, "quantizer.codes"), ({"update": "sgd"}, "quantizer.update"), ({"ema_decay": 1.0}, "ema_decay")],
)
def test_wrong_settings_are_refused(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(RqVaeConfig, settings, "quantizer")
