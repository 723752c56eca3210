"""Search in residual codebooks, layer by layer: greedy, or by beam search.

Shapes: D layers, P groups, R codewords of M dimensions each, W paths of a beam.
|r - c|^2 = |r|^2 - 2 <r, c> + |c|^2, so a layer costs one matrix product and no [B, R, M] differences.
"""

import torch
from torch import Tensor

_CELLS_AT_A_TIME = 1 << 22


def nearest_paths(x_BPM: Tensor, words_DPRM: Tensor, beam: int) -> Tensor:
    """Return the numbers of the codewords whose sums approximate vectors: int64 [B, D * P], depth-major.

    Args:
        x_BPM: the vectors, [B, P, M]; each group is quantized independently.
        words_DPRM: the codebooks, [D, P, R, M].
        beam: paths kept at every layer. 1: each layer's nearest codeword; R^(D-1) or more: the nearest sum.
    """
    if beam == 1:
        return _greedy(x_BPM, words_DPRM)
    rows = max(_CELLS_AT_A_TIME // (beam * words_DPRM.shape[1] * words_DPRM.shape[2]), 1)
    return torch.cat([_beam(part_BPM, words_DPRM, beam) for part_BPM in torch.split(x_BPM, rows)])


def take_codewords(words_PRM: Tensor, digits_BP: Tensor) -> Tensor:
    """Look up one layer's codewords by digit: [B, P, M]."""
    groups_P = torch.arange(words_PRM.shape[0], device=digits_BP.device)
    return words_PRM[groups_P, digits_BP]


def spread_over_groups(words_DPRM: Tensor) -> Tensor:
    """Return the table of `Quantizer.codewords`: each in its group's block, 0 elsewhere, [D * P, R, P * M]."""
    depth, groups, radix, width = words_DPRM.shape
    blocks_PP = torch.eye(groups, device=words_DPRM.device)
    table_DPRPM = words_DPRM[:, :, :, None, :] * blocks_PP[:, None, :, None]
    return table_DPRPM.reshape(depth * groups, radix, groups * width)


def _greedy(x_BPM: Tensor, words_DPRM: Tensor) -> Tensor:
    residual_BPM, digits = x_BPM, []
    for words_PRM in words_DPRM:
        digits_BP = _costs(residual_BPM.transpose(0, 1), words_PRM).argmin(-1).T
        residual_BPM = residual_BPM - take_codewords(words_PRM, digits_BP)
        digits.append(digits_BP)
    return torch.cat(digits, dim=1)


def _beam(x_BPM: Tensor, words_DPRM: Tensor, beam: int) -> Tensor:
    depth, groups, radix, width = words_DPRM.shape
    batch = len(x_BPM)
    residual_PBWM = x_BPM.transpose(0, 1)[:, :, None]
    paths_PBWD = torch.empty(groups, batch, 1, 0, dtype=torch.int64, device=x_BPM.device)
    for words_PRM in words_DPRM:
        num_paths = residual_PBWM.shape[2]
        costs_PQR = _costs(residual_PBWM.reshape(groups, -1, width), words_PRM)
        # The paths of one vector have different residuals, so |r|^2 is part of the cost here.
        costs_PBWR = costs_PQR.view(groups, batch, num_paths, radix) + residual_PBWM.square().sum(-1, keepdim=True)
        kept = min(beam, num_paths * radix)
        best_PBW = costs_PBWR.flatten(2).topk(kept, largest=False).indices  # in rising order of cost
        parent_PBW, word_PBW = best_PBW // radix, best_PBW % radix
        groups_P11 = torch.arange(groups, device=x_BPM.device)[:, None, None]
        left_PBWM = residual_PBWM.gather(2, parent_PBW[..., None].expand(-1, -1, -1, width))
        residual_PBWM = left_PBWM - words_PRM[groups_P11, word_PBW]
        history_PBWD = paths_PBWD.gather(2, parent_PBW[..., None].expand(-1, -1, -1, paths_PBWD.shape[-1]))
        paths_PBWD = torch.cat([history_PBWD, word_PBW[..., None]], dim=-1)
    return paths_PBWD[:, :, 0].permute(1, 2, 0).reshape(batch, depth * groups)


def _costs(x_PBM: Tensor, words_PRM: Tensor) -> Tensor:
    """Return |x - c|^2 - |x|^2 of all pairs: [P, B, R]."""
    return torch.baddbmm(words_PRM.square().sum(-1)[:, None], x_PBM, words_PRM.transpose(1, 2), alpha=-2)
