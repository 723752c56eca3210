"""The structured quantizer: Eq. 2 by hand, fast encoding compared with the plain loop, start, revival."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sidestack.encoder.quantizers import RqVaeConfig
from sidestack.encoder.quantizers.lines import refitted_lines
from sidestack.encoder.quantizers.structured import Structured, StructuredConfig
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError

B = 512


def fitted(dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> tuple[Structured, Tensor]:
    """Return a quantizer started on a sample of correlated vectors, and the sample."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantizer = StructuredConfig.model_validate(settings).build().to(dtype)
    mix = torch.randn(quantizer.latent_dim, quantizer.latent_dim, generator=generator, dtype=torch.float64)
    h_BH = torch.randn(B, quantizer.latent_dim, generator=generator, dtype=torch.float64) @ mix
    quantizer.start(h_BH.to(dtype), generator)
    with torch.no_grad():  # perturb the orthogonal axes and centred offsets that start chooses
        for parameter in quantizer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return quantizer, h_BH.to(dtype)


@torch.no_grad()
def eq2_by_hand(quantizer: Structured, h_H: Tensor) -> list[int]:
    """Return the digits of one vector by the paper's Eq. 2-3, in scalar Python."""
    config, (u, b, a) = quantizer.config, quantizer.codebook()
    digits = []
    blocks = list(h_H.split(config.group_dim))
    for d in range(config.depth):
        for p in range(config.groups):
            best: tuple[float, int, int] | None = None
            for k in range(config.lines):
                x = blocks[p] - b[d, p, k]
                along = float(x @ u[d, p, k])
                step = float(a[d, p, k])
                level = min(max(round(along / step + (config.levels - 1) / 2), 0), config.levels - 1)
                distance = float(x @ x) - along**2
                if config.assign == "codeword":
                    distance += (along - step * (level - (config.levels - 1) / 2)) ** 2
                if best is None or distance < best[0]:
                    best = (distance, k, level)
            assert best is not None
            _, k, level = best
            digits.append(k * config.levels + level)
            blocks[p] = blocks[p] - b[d, p, k] - a[d, p, k] * (level - (config.levels - 1) / 2) * u[d, p, k]
    return digits


@pytest.mark.parametrize(
    "settings",
    [
        {"levels": 3, "lines": 1, "groups": 3, "depth": 5, "group_dim": 4},
        {"levels": 4, "lines": 1, "groups": 2, "depth": 3, "group_dim": 5},
        {"levels": 3, "lines": 5, "groups": 2, "depth": 2, "group_dim": 4},
        {"levels": 2, "lines": 4, "groups": 1, "depth": 3, "group_dim": 6, "assign": "codeword"},
    ],
)
def test_codes_match_the_equations_of_the_paper(settings: dict[str, Any]) -> None:
    quantizer, h_BH = fitted(**settings)
    expected = [eq2_by_hand(quantizer, h_H) for h_H in h_BH[:16]]
    assert quantizer.encode_by_residuals(h_BH[:16]).tolist() == expected
    assert quantizer.encode(h_BH[:16]).tolist() == expected


@pytest.mark.parametrize("bound", ["clamp", "tanh", "ifsq"])
@pytest.mark.parametrize(("levels", "groups", "depth"), [(3, 3, 5), (3, 1, 15), (8, 2, 4), (2, 15, 1)])
def test_one_product_encoding_equals_the_plain_loop(bound: str, levels: int, groups: int, depth: int) -> None:
    quantizer, h_BH = fitted(bound=bound, levels=levels, groups=groups, depth=depth, group_dim=8)
    slow_BN, fast_BN = quantizer.encode_by_residuals(h_BH), quantizer.encode_by_one_product(h_BH)
    assert torch.equal(slow_BN, fast_BN)
    assert all(len(column.unique()) == levels for column in slow_BN[:, :groups].T)


def test_one_product_encoding_in_float32_differs_only_at_thresholds() -> None:
    """In float32 the two orders of summation may differ where a projection lies on a threshold."""
    quantizer, h_BH = fitted(torch.float32, groups=3, depth=5, group_dim=8)
    slow_BN, fast_BN = quantizer.encode_by_residuals(h_BH), quantizer.encode_by_one_product(h_BH)
    exact_BN = quantizer.double().encode_by_residuals(h_BH.double())
    for codes_BN in (slow_BN, fast_BN):
        assert (codes_BN == exact_BN).all(-1).float().mean() > 0.99
    assert (slow_BN == fast_BN).all(-1).float().mean() > 0.99


@pytest.mark.parametrize("seed", range(5))
def test_one_layer_by_codeword_is_never_worse_than_by_line(seed: int) -> None:
    settings: dict[str, Any] = {"levels": 3, "lines": 6, "groups": 2, "depth": 1, "group_dim": 4}
    by_line, h_BH = fitted(seed=seed, assign="line", **settings)
    by_codeword, _ = fitted(seed=seed, assign="codeword", **settings)
    by_codeword.load_state_dict(by_line.state_dict())
    line_B = (h_BH - by_line.decode(by_line.encode(h_BH))).square().sum(-1)
    codeword_B = (h_BH - by_codeword.decode(by_codeword.encode(h_BH))).square().sum(-1)
    assert bool((codeword_B <= line_B + 1e-9).all())
    assert codeword_B.sum().item() < line_B.sum().item()


def test_deeper_layers_reduce_the_residual() -> None:
    quantizer, h_BH = fitted(groups=1, depth=12, group_dim=6)
    quantizer.start(h_BH, torch.Generator().manual_seed(1))
    errors, residual_BPM = [], quantizer._blocks(h_BH)
    for depth in range(12):
        residual_BPM = quantizer._next_residual(residual_BPM, depth)
        errors.append(float(residual_BPM.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.15 * float(h_BH.var())


def test_pca_start_beats_random_start() -> None:
    errors = {}
    for directions in ("pca", "random"):
        quantizer, h_BH = fitted(directions=directions, groups=1, depth=6, group_dim=12)
        quantizer.start(h_BH, torch.Generator().manual_seed(1))
        errors[directions] = float((h_BH - quantizer.decode(quantizer.encode(h_BH))).square().mean())
    assert errors["pca"] < errors["random"]


def test_start_depends_only_on_sample_and_seed() -> None:
    first, h_BH = fitted(lines=3, groups=2, depth=2)
    second, _ = fitted(seed=7, lines=3, groups=2, depth=2)
    for quantizer in (first, second):
        quantizer.start(h_BH, torch.Generator().manual_seed(3))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dead_lines_are_revived() -> None:
    quantizer, h_BH = fitted(levels=3, lines=8, groups=2, depth=1, group_dim=4)
    with torch.no_grad():
        quantizer.offset_DPKM[0, 0, 3:] = 1e4
    assert quantizer.revive(h_BH, torch.Generator().manual_seed(0)) >= 5
    used = (quantizer.encode(h_BH)[:, 0] // 3).unique()
    assert len(used) == 8
    assert quantizer.revive(h_BH, torch.Generator().manual_seed(0)) == 0


def test_training_step_moves_codebook_and_passes_gradient_straight_through() -> None:
    quantizer, h_BH = fitted(torch.float32, groups=2, depth=3, group_dim=4)
    h_BH.requires_grad_()
    quantized = quantizer(h_BH)
    assert torch.allclose(quantized.straight_through, quantized.h_hat, atol=1e-6)
    quantized.straight_through.sum().backward(retain_graph=True)
    assert torch.equal(h_BH.grad, torch.ones_like(h_BH))
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    quantized.codebook_loss().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in quantizer.parameters())
    before = quantized.codebook_loss().mean().item()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(1e-4 * parameter.grad)
    assert quantizer(h_BH).codebook_loss().mean().item() < before


def test_quantization_runs_in_float32_under_autocast_and_for_half_inputs() -> None:
    quantizer, h_BH = fitted(torch.float32, groups=3, depth=5, group_dim=4)
    half_BH = h_BH.bfloat16()
    expected_BN = quantizer.encode(half_BH.float())
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(half_BH)
    assert torch.equal(quantized.digits, expected_BN)
    assert quantized.h_hat.dtype == torch.float32


def test_spec_has_positive_steps_for_one_line_and_pair_digits_for_several() -> None:
    dpca, _ = fitted(torch.float32, groups=3, depth=5)
    spec = dpca.sid_spec("ab")
    assert (spec.levels, spec.digits, spec.depth, spec.groups, spec.radix) == (3, 15, 5, 3, 3)
    assert len(spec.steps) == 15 and min(spec.steps) > 0
    lines, h_BH = fitted(torch.float32, levels=3, lines=5, groups=1, depth=2)
    spec = lines.sid_spec("ab")
    assert spec.radix == 15 and spec.steps == ()
    digits_BN = lines.encode(h_BH)
    assert torch.equal(spec.unpack(spec.pack(digits_BN)), digits_BN)


def test_unknown_quantizer_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="quantizer.colour: unknown key"):
        parse(StructuredConfig, {"colour": 1}, "quantizer")
    with pytest.raises(ConfigError, match="levels"):
        parse(StructuredConfig, {"levels": 1}, "quantizer")


def clustered(rows: int, dim: int) -> Tensor:
    """Return float64 vectors drawn from a mixture of normal distributions."""
    generator = torch.Generator().manual_seed(11)
    centres_CM = torch.randn(40, dim, generator=generator, dtype=torch.float64)
    owner_N = torch.randint(40, (rows,), generator=generator)
    return centres_CM[owner_N] + 0.4 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)


def start_error(h_BH: Tensor, **settings: object) -> float:
    quantizer = StructuredConfig.model_validate({"group_dim": h_BH.shape[1], "groups": 1, **settings}).build().double()
    quantizer.start(h_BH, torch.Generator().manual_seed(0))
    return float((h_BH - quantizer.decode(quantizer.encode(h_BH))).detach().square().mean() / h_BH.var())


@pytest.mark.parametrize("assign", ["line", "codeword"])
def test_start_error_of_lines_is_close_to_a_free_codebook_of_the_same_size(assign: str) -> None:
    h_BH = clustered(4096, 8)
    free = RqVaeConfig(codes=64, depth=2, group_dim=8).build().double()
    free.start(h_BH, torch.Generator().manual_seed(0))
    reference = float((h_BH - free.decode(free.encode(h_BH))).detach().square().mean() / h_BH.var())
    error = start_error(h_BH, lines=32, levels=2, depth=2, assign=assign, refits=5)
    assert error < 1.15 * reference


@pytest.mark.parametrize("assign", ["line", "codeword"])
def test_refits_lower_the_error(assign: str) -> None:
    h_BH = clustered(4096, 8)
    crude = start_error(h_BH, lines=21, levels=3, depth=2, assign=assign)
    assert start_error(h_BH, lines=21, levels=3, depth=2, assign=assign, refits=5) < 0.95 * crude


def test_refit_is_the_least_squares_fit_of_each_line() -> None:
    generator = torch.Generator().manual_seed(0)
    x_NM = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    line_N, q_N = torch.randint(3, (300,), generator=generator), torch.randint(-1, 2, (300,), generator=generator)
    q_N = torch.where(line_N == 1, 1, q_N).double()  # line 1's points all take one value; line 3 has no points
    lines, fit = refitted_lines(x_NM, line_N, q_N, 4)
    assert lines.tolist() == [0, 2]
    for line, b_M, v_M, length in zip(lines, *fit, strict=True):
        own_N = line_N == line
        design_N2 = torch.stack([torch.ones(int(own_N.sum()), dtype=torch.float64), q_N[own_N]], dim=1)
        expected_2M = torch.linalg.lstsq(design_N2, x_NM[own_N]).solution
        assert torch.allclose(torch.stack([b_M, v_M]), expected_2M)
        assert length == pytest.approx(float(v_M.norm()))


def test_wider_beam_over_lines_lowers_the_error_and_needs_codeword_assignment() -> None:
    settings: dict[str, Any] = {"levels": 3, "lines": 5, "groups": 2, "depth": 4, "group_dim": 4, "assign": "codeword"}
    greedy, h_BH = fitted(**settings)
    errors = []
    for beam in (1, 2, 16):
        quantizer = StructuredConfig.model_validate({**settings, "beam": beam}).build().double()
        quantizer.load_state_dict(greedy.state_dict())
        digits_BN = quantizer.encode(h_BH)
        errors.append(float((h_BH - quantizer.decode(digits_BN)).detach().square().mean()))
    assert errors[0] > errors[1] > errors[2]
    with pytest.raises(ConfigError, match="beam 4 compares codewords: it needs assign: codeword, not line"):
        parse(StructuredConfig, {"beam": 4}, "quantizer")


def test_line_choice_by_products_matches_differences_in_float32() -> None:
    """|r - b|^2 by products cancels for vectors far from 0; only vectors at a border may take another line."""
    quantizer, h_BH = fitted(torch.float32, levels=3, lines=16, groups=2, depth=3, group_dim=8)
    far_BH = h_BH + 10
    quantizer.start(far_BH, torch.Generator().manual_seed(0))
    exact_BN = torch.tensor([eq2_by_hand(quantizer, h_H) for h_H in far_BH[:64]])
    assert (quantizer.encode(far_BH[:64]) == exact_BN).all(1).float().mean() > 0.95


def test_state_has_usage_counters_only_with_several_lines() -> None:
    """With one line per layer the state, and so its fingerprint, is that of releases without usage counters."""
    one, _ = fitted(torch.float32)
    assert sorted(one.state_dict()) == ["direction_DPKM", "log_step_DPK", "offset_DPKM", "thresholds", "values_L"]
