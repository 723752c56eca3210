"""Encoding with one line a layer by a single matrix product (DPCA's fast path).

A layer's digit depends only on the residual's projection t = <r - b, u> / a, and the residual is the vector minus the
codewords of the layers before. So all projections are computed from the vector itself, Z = U h^T. Each codeword then
changes the later projections by a constant, <u_d, u_j> a_d / a_j. The serial part works on one number per digit.

Z has digits as rows: with so few digits this is the faster layout for the product. Each step over the depth, and the
packing into ids, then reads and writes whole rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layers(NamedTuple):
    """A codebook with one line a layer: unit directions u [D,P,M], offsets b [D,P,M], steps a [D,P]."""

    u: Tensor
    b: Tensor
    a: Tensor


@torch.no_grad()
def encode_by_recursion(h_BH: Tensor, layers: Layers, thresholds: Tensor, values_L: Tensor, *, even: bool) -> Tensor:
    """Return the levels of all layers.

    Args:
        h_BH: vectors, the groups' blocks side by side, [B, P * M].
        layers: the codebook.
        thresholds: borders between the levels in units of the step, [L-1].
        values_L: the value of each level, in units of the step, [L].
        even: the values are l - (L-1)/2 and the thresholds half-way between, so that a level is found by rounding.

    Returns:
        digits_BN: int64 [B, D * P], depth-major; a view of digits by rows.
    """
    depth, groups, _ = layers.u.shape
    t_DPB = _projections(h_BH, layers)
    # The amount that one unit of layer d's value subtracts from the projection of a later layer j of its group.
    taken_DDP = torch.einsum("dpm,jpm->djp", layers.u * layers.a[..., None], layers.u / layers.a[..., None])
    if even:
        _round_by_layer(t_DPB, taken_DDP, len(values_L))
    else:
        _look_up_by_layer(t_DPB, taken_DDP, thresholds, values_L)
    return t_DPB.view(depth * groups, -1).T.to(torch.int64)


def _projections(h_BH: Tensor, layers: Layers) -> Tensor:
    """Return <h - b_1 - .. - b_d, u_d> / a_d of each layer, [D, P, B]; the offsets are the same for all vectors."""
    depth, groups, dim = layers.u.shape
    scaled_DPM = layers.u / layers.a[..., None]
    constant_DP = (layers.b.cumsum(0) * scaled_DPM).sum(-1)
    blocks_PP = torch.eye(groups, dtype=scaled_DPM.dtype, device=scaled_DPM.device)
    rows_NH = (scaled_DPM[:, :, None] * blocks_PP[:, :, None]).view(depth * groups, groups * dim)
    return torch.addmm(-constant_DP.view(-1, 1), rows_NH, h_BH.T).view(depth, groups, -1)


def _round_by_layer(t_DPB: Tensor, taken_DDP: Tensor, levels: int) -> None:
    """Replace projections by levels, in place: l = clamp(ceil(t + (L-2)/2)), where a tie goes to the lower level.

    The levels' centre, (L-1)/2, is a constant too: it is added beforehand, so that the levels l can be subtracted.
    """
    earlier_DDP = torch.triu(taken_DDP.permute(2, 0, 1), 1).permute(1, 2, 0)
    t_DPB += ((levels - 2) / 2 + earlier_DDP.sum(0) * (levels - 1) / 2)[..., None]
    for d in range(len(t_DPB)):
        level_PB = t_DPB[d].ceil_().clamp_(0, levels - 1)
        t_DPB[d + 1 :].addcmul_(taken_DDP[d, d + 1 :, :, None], level_PB, value=-1)


def _look_up_by_layer(t_DPB: Tensor, taken_DDP: Tensor, thresholds: Tensor, values_L: Tensor) -> None:
    """Replace projections by levels, in place, for any thresholds and values."""
    for d in range(len(t_DPB)):
        level_PB = torch.bucketize(t_DPB[d], thresholds)
        t_DPB[d + 1 :].addcmul_(taken_DDP[d, d + 1 :, :, None], values_L[level_PB], value=-1)
        t_DPB[d] = level_PB
