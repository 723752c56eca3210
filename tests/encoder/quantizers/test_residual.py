"""Search in residual codebooks, compared with a plain loop over differences and with all sums of codewords."""

import itertools

import pytest
import torch
from torch import Tensor

from sidestack.encoder.quantizers.residual import nearest_paths, spread_over_groups, take_codewords


def random_words(depth: int, groups: int, codes: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return vectors [64, P, M] and codebooks [D, P, R, M] whose scale shrinks with depth."""
    generator = torch.Generator().manual_seed(seed)
    words_DPRM = torch.randn(depth, groups, codes, width, generator=generator, dtype=torch.float64)
    words_DPRM *= 0.6 ** torch.arange(depth)[:, None, None, None]
    return torch.randn(64, groups, width, generator=generator, dtype=torch.float64), words_DPRM


def error_of(x_BPM: Tensor, words_DPRM: Tensor, digits_BN: Tensor) -> Tensor:
    """Return the squared distance to the sum of codewords, [B]."""
    layers = digits_BN.split(words_DPRM.shape[1], dim=1)
    h_hat_BPM = sum(take_codewords(words_PRM, digits) for words_PRM, digits in zip(words_DPRM, layers, strict=True))
    return (x_BPM - h_hat_BPM).square().sum((1, 2))


def plain_loop(x_BPM: Tensor, words_DPRM: Tensor) -> list[list[int]]:
    rows = []
    for x_PM in x_BPM:
        residual, digits = [x_M.clone() for x_M in x_PM], []
        for words_PRM in words_DPRM:
            for group, words_RM in enumerate(words_PRM):
                best = int((residual[group] - words_RM).square().sum(-1).argmin())
                residual[group] -= words_RM[best]
                digits.append(best)
        rows.append(digits)
    return rows


@pytest.mark.parametrize("shape", [(3, 1, 16, 5), (2, 3, 7, 4), (1, 2, 2, 1)])
def test_greedy_search_equals_the_plain_loop(shape: tuple[int, int, int, int]) -> None:
    x_BPM, words_DPRM = random_words(*shape)
    assert nearest_paths(x_BPM, words_DPRM, beam=1).tolist() == plain_loop(x_BPM, words_DPRM)


@pytest.mark.parametrize("shape", [(3, 1, 4, 3), (2, 2, 6, 3), (4, 1, 3, 2)])
def test_beam_as_wide_as_all_paths_finds_the_nearest_sum(shape: tuple[int, int, int, int]) -> None:
    depth, groups, codes, _ = shape
    x_BPM, words_DPRM = random_words(*shape)
    digits_BN = nearest_paths(x_BPM, words_DPRM, beam=codes ** (depth - 1))
    for group in range(groups):
        paths = torch.tensor(list(itertools.product(range(codes), repeat=depth)))
        sums_SM = words_DPRM[torch.arange(depth), group, paths].sum(1)
        best_B = torch.cdist(x_BPM[:, group], sums_SM).argmin(1)
        assert torch.equal(digits_BN[:, group::groups], paths[best_B])


@pytest.mark.parametrize("seed", range(3))
def test_wider_beam_lowers_the_error(seed: int) -> None:
    x_BPM, words_DPRM = random_words(4, 2, 8, 6, seed)
    errors = [float(error_of(x_BPM, words_DPRM, nearest_paths(x_BPM, words_DPRM, b)).mean()) for b in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2]


def test_digits_of_a_row_do_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BPM, words_DPRM = random_words(3, 2, 8, 6)
    whole_BN = nearest_paths(x_BPM, words_DPRM, beam=4)
    monkeypatch.setattr("sidestack.encoder.quantizers.residual._CELLS_AT_A_TIME", 4 * 2 * 8 * 10)  # ten rows at a time
    assert torch.equal(nearest_paths(x_BPM, words_DPRM, beam=4), whole_BN)
    assert torch.equal(nearest_paths(x_BPM[7:8], words_DPRM, beam=4), whole_BN[7:8])
    assert nearest_paths(x_BPM[:0], words_DPRM, beam=4).shape == nearest_paths(x_BPM[:0], words_DPRM, 1).shape == (0, 6)


def test_groups_do_not_overlap_in_the_table() -> None:
    _, words_DPRM = random_words(2, 3, 4, 5)
    table_NRH = spread_over_groups(words_DPRM.float())
    assert table_NRH.shape == (6, 4, 15)
    assert torch.equal(table_NRH[4, 2, 5:10], words_DPRM[1, 1, 2].float())
    assert int((table_NRH != 0).sum()) == words_DPRM.numel()
