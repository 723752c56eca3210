"""The contract that every kind of quantizer fulfils."""

import pytest
import torch
from torch import Tensor

from sidestack.encoder.quantizers import Quantizer
from sidestack.encoder.quantizers.contract import at_least_float32
from sidestack.encoder.sid.packing import pack_digits
from sidestack.infra.distributed import World
from tests.distributed import run_distributed
from tests.encoder.quantizers.kinds import KINDS, RESIDUAL, made, started, vectors
from tests.encoder.quantizers.worlds import ALONE


def sum_of_codewords(quantizer: Quantizer, digits_BN: Tensor, kept_BN: Tensor) -> Tensor:
    table_NRH = quantizer.codewords()
    total_BH = torch.zeros(len(digits_BN), quantizer.latent_dim)
    for row, (digits_N, kept_N) in enumerate(zip(digits_BN.tolist(), kept_BN.tolist(), strict=True)):
        for n, digit in enumerate(digits_N):
            total_BH[row] += table_NRH[n, digit].detach() * kept_N[n]
    return total_BH


@pytest.mark.parametrize("name", KINDS)
def test_digits_pack_and_decode_to_the_sum_of_their_codewords(name: str) -> None:
    quantizer, h_BH = started(name)
    digits_BN = quantizer.encode(h_BH[:50])
    spec = quantizer.sid_spec("ab")
    assert digits_BN.dtype == torch.int64 and digits_BN.shape == (50, spec.digits)
    assert torch.equal(spec.unpack(spec.pack(digits_BN)), digits_BN)
    assert quantizer.codewords().shape == (spec.digits, spec.radix, quantizer.latent_dim)
    kept_BN = torch.rand(digits_BN.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    for kept in (torch.ones_like(kept_BN), kept_BN):
        expected_BH = sum_of_codewords(quantizer, digits_BN, kept)
        assert torch.allclose(quantizer.decode(digits_BN, kept), expected_BH, atol=1e-5)
    assert torch.equal(quantizer.decode(digits_BN), quantizer.decode(digits_BN, torch.ones_like(kept_BN)))


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_determines_digits_and_codewords(name: str) -> None:
    quantizer, h_BH = started(name)
    other = made(name)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.encode(h_BH), quantizer.encode(h_BH))
    assert torch.equal(other.codewords(), quantizer.codewords())


@pytest.mark.parametrize("name", KINDS)
def test_start_depends_only_on_sample_and_seed(name: str) -> None:
    threads = torch.get_num_threads()
    first, _ = started(name)
    second = made(name)
    torch.set_num_threads(2)
    try:
        second.start(vectors(seed=5), torch.Generator().manual_seed(7))
        second.start(vectors(), torch.Generator().manual_seed(1))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("name", [name for name in KINDS if "itq" not in name])
def test_start_stays_finite_with_fewer_rows_than_codes(name: str, rows: int) -> None:
    quantizer = made(name)
    quantizer.start(vectors(rows), torch.Generator().manual_seed(1))
    assert all(bool(tensor.isfinite().all()) for tensor in quantizer.state_dict().values())
    assert bool(quantizer.decode(quantizer.encode(vectors(20))).isfinite().all())


@pytest.mark.parametrize("name", KINDS)
def test_encoder_receives_the_straight_through_gradient(name: str) -> None:
    quantizer, h_BH = started(name)
    h_BH.requires_grad_()
    quantized = quantizer.train()(h_BH)
    assert torch.allclose(quantized.straight_through, quantized.h_hat, atol=1e-5)
    weights_H = torch.arange(1.0, 9.0)
    (through_BH,) = torch.autograd.grad((quantized.straight_through * weights_H).sum(), h_BH, retain_graph=True)
    (expected_BH,) = torch.autograd.grad((quantized.latent * weights_H).sum(), h_BH, retain_graph=True)
    assert torch.equal(through_BH, expected_BH) and bool((through_BH != 0).any())
    learned = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    (quantized.codebook_loss().sum() + quantized.commitment_loss().sum()).backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in learned)
    assert all(parameter.grad is None for parameter in quantizer.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("name", KINDS)
def test_quantization_runs_in_float32_under_autocast(name: str) -> None:
    quantizer, h_BH = started(name)
    half_BH = h_BH.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(half_BH)
    assert quantized.h_hat.dtype == torch.float32
    assert torch.equal(quantized.digits, quantizer.encode(at_least_float32(half_BH)))


@pytest.mark.parametrize("name", RESIDUAL)
def test_every_layer_reduces_the_reconstruction_error(name: str) -> None:
    quantizer, h_BH = started(name)
    digits_BN = quantizer.encode(h_BH)
    layer_N = torch.arange(quantizer.digits) // (quantizer.digits // quantizer.depth)
    errors = []
    for layers in range(1, quantizer.depth + 1):
        h_hat_BH = quantizer.decode(digits_BN, (layer_N < layers).expand_as(digits_BN))
        errors.append(float((quantizer.latent(h_BH) - h_hat_BH).detach().square().mean()))
    assert all(finer < 0.9 * coarser for coarser, finer in zip(errors[:-1], errors[1:], strict=True))


@pytest.mark.parametrize("name", RESIDUAL)
def test_prefix_dropout_decodes_some_rows_from_fewer_layers(name: str) -> None:
    quantizer, h_BH = started(name, prefix_dropout=0.5)
    torch.manual_seed(3)
    quantized = quantizer.train()(h_BH)
    torch.manual_seed(3)
    again = quantizer(h_BH)
    assert torch.equal(quantized.h_hat, again.h_hat)
    digits_BN, layer_N = quantized.digits, torch.arange(quantizer.digits) // (quantizer.digits // quantizer.depth)
    prefixes = torch.stack(
        [quantizer.decode(digits_BN, (layer_N <= d).expand_as(digits_BN)) for d in range(quantizer.depth)]
    )
    matches_DB = (prefixes - quantized.h_hat).abs().amax(-1) < 1e-6
    assert bool(matches_DB.any(0).all())
    # Half of the rows keep 1, 2 or 3 layers, the others all 3.
    assert matches_DB.float().mean(1).tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 3], abs=0.05)
    assert torch.equal(quantized.whole, quantizer.decode(digits_BN))
    whole_B = (quantized.latent - quantized.whole).square().mean(-1)
    assert torch.equal(quantized.commitment_loss(), whole_B)
    assert float(quantized.codebook_loss().detach().mean()) > float(whole_B.detach().mean())
    assert torch.equal(quantizer.eval()(h_BH).h_hat, quantizer.decode(digits_BN))


@pytest.mark.parametrize("name", RESIDUAL)
def test_no_random_number_is_drawn_without_prefix_dropout(name: str) -> None:
    quantizer, h_BH = started(name)
    before = torch.get_rng_state()
    quantized = quantizer.train()(h_BH)
    assert torch.equal(torch.get_rng_state(), before)
    assert quantized.whole is quantized.h_hat


def test_prefix_dropout_lowers_the_error_of_prefixes() -> None:
    """The first layer of codewords trained with prefix dropout has a lower error than without."""
    errors = {}
    for share in (0.0, 0.5):
        quantizer = made("rqvae", prefix_dropout=share).train()
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
        torch.manual_seed(0)
        for step in range(150):
            optimizer.zero_grad()
            quantizer(vectors(256, seed=step)).codebook_loss().mean().backward()
            optimizer.step()
        h_BH = vectors(seed=1000)
        digits_BN = quantizer.encode(h_BH)
        kept_BN = (torch.arange(6) < 2).expand_as(digits_BN)
        errors[share] = float((h_BH - quantizer.decode(digits_BN, kept_BN).detach()).square().mean())
    assert errors[0.5] < 0.9 * errors[0.0]


@pytest.mark.parametrize("name", ["lines", "rqvae", "rqvae_ema"])
def test_revival_replaces_unused_codewords_only(name: str) -> None:
    quantizer, h_BH = started(name)
    assert quantizer.revives
    assert quantizer.revive(h_BH, torch.Generator().manual_seed(0)) == 0
    with torch.no_grad():
        words = quantizer.get_parameter("offset_DPKM" if name == "lines" else "codebook_DPRM")
        words[0, 0, 2:] = 1e3
    before_NR = quantizer.codewords()[0].detach().clone()
    assert quantizer.revive(h_BH, torch.Generator().manual_seed(0)) >= words.shape[2] - 2
    size = 3 if name == "lines" else 1
    assert torch.equal(quantizer.codewords()[0, : 2 * size], before_NR[: 2 * size])
    used = (quantizer.encode(h_BH)[:, 0] // size).unique()
    assert len(used) >= 0.9 * words.shape[2]


@pytest.mark.parametrize("name", ["lines", "rqvae", "rqvae_ema"])
def test_codes_used_since_the_last_revival_are_not_replaced(name: str) -> None:
    """A sample of a few rows uses few codes; codes that training rows used since the last revival must be kept."""
    quantizer, h_BH = started(name)
    quantizer.train()(h_BH)
    quantizer.after_step(ALONE)
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    assert quantizer.revive(h_BH[:2], torch.Generator().manual_seed(0)) == 0
    for key, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[key]) or key == "usage.counts_NR"
    assert quantizer.revive(h_BH[:2], torch.Generator().manual_seed(0)) > 0


@pytest.mark.parametrize("name", [name for name in KINDS if made(name).revives is False])
def test_revive_is_a_no_op_for_quantizers_without_revival(name: str) -> None:
    quantizer, h_BH = started(name)
    before = {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
    quantizer.train()(h_BH)
    quantizer.after_step(ALONE)
    assert quantizer.revive(h_BH[:1], torch.Generator().manual_seed(0)) == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in quantizer.state_dict().items())


def state_after_training(world: World, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Train each quantizer on this rank's rows, without gradient steps, and return its state."""
    states = {}
    for name in names:
        quantizer, _ = started(name)
        quantizer.train()
        for step in range(3):
            quantizer(vectors(64, seed=100 + step).chunk(world.size)[world.rank])
            quantizer.after_step(world)
        quantizer.revive(vectors(16), torch.Generator().manual_seed(2))
        states[name] = quantizer.state_dict()
    return states


def test_ranks_agree_on_averages_and_use() -> None:
    names = ["lines", "rqvae", "rqvae_ema"]
    first, second = run_distributed(state_after_training, names)
    alone = state_after_training(ALONE, names)
    for name in names:
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            assert torch.allclose(first[name][key], alone[name][key], atol=1e-5), (name, key)
    assert not torch.equal(first["rqvae_ema"]["codebook_DPRM"], started("rqvae_ema")[0].get_parameter("codebook_DPRM"))


def test_prefix_of_topk_ids_is_a_smaller_k() -> None:
    """Fifty of a thousand clusters need nine int64 columns, and the first digit alone is top-1."""
    quantizer, h_BH = started("topk_kmeans", clusters=1000, k=50)
    digits_BN, spec = quantizer.encode(h_BH), quantizer.sid_spec("ab")
    ids_BC = spec.pack(digits_BN)
    assert ids_BC.shape == (len(h_BH), len(spec.chunk_sizes)) and len(spec.chunk_sizes) == 9
    assert (spec.depth, spec.groups) == (1, 50), "no digit refines another, so they form one layer"
    top1 = spec.of_prefix(1)
    assert torch.equal(spec.cut(ids_BC, 1), top1.pack(digits_BN[:, :1]))
    assert torch.equal(top1.pack(digits_BN[:, :1])[:, 0], pack_digits(digits_BN[:, :1], 1000))
