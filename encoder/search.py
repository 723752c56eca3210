"""Encoding by search: digits refined by coordinate descent through the decoder.

Rounding takes the digits whose codewords are nearest in the latent space, but what matters is how well the decoder
reconstructs the signals. So each digit in turn tries other values, with the rest fixed, and keeps the value of least
loss; a few passes over the digits are enough. Nothing is retrained. The cost is rounds x digits x candidates decoder
runs per item.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sidestack.encoder.config import SearchConfig
from sidestack.encoder.quantizers.contract import Quantizer


@torch.no_grad()
def refine_digits(
    quantizer: Quantizer,
    losses_of: Callable[[Tensor], Tensor],
    h_BH: Tensor,
    digits_BN: Tensor,
    config: SearchConfig,
) -> tuple[Tensor, Tensor]:
    """Refine digits by coordinate descent on a loss of the vectors that they decode to.

    A digit changes only where another value is strictly better, so the loss never rises.

    Args:
        quantizer: provides the codewords.
        losses_of: maps C candidates for each row, [B, C, latent_dim], to their losses [B, C].
        h_BH: the latent vectors, bounded. digits_BN: the initial digits.
        config: the extent of the search.

    Returns:
        digits int64 [B, digits], and their loss [B].
    """
    table_NRH = quantizer.codewords().detach()
    digits_BN = digits_BN.clone()
    h_hat_BH = quantizer.decode(digits_BN)
    loss_B = losses_of(h_hat_BH[:, None]).squeeze(1)
    for _ in range(config.rounds):
        for n, table_RH in enumerate(table_NRH):
            rest_BH = h_hat_BH - table_RH[digits_BN[:, n]]
            tried_BC = _nearest(h_BH - rest_BH, table_RH, config.candidates)
            losses_BC = losses_of(rest_BH[:, None] + table_RH[tried_BC])
            least_B, place_B = losses_BC.min(-1)
            value_B = tried_BC.gather(1, place_B[:, None]).squeeze(1)
            better_B = least_B < loss_B
            digits_BN[:, n] = torch.where(better_B, value_B, digits_BN[:, n])
            loss_B = torch.where(better_B, least_B, loss_B)
            h_hat_BH = rest_BH + table_RH[digits_BN[:, n]]
    return digits_BN, loss_B


def _nearest(target_BH: Tensor, table_RH: Tensor, candidates: int) -> Tensor:
    """Return the values whose codewords are nearest to a target, int64 [B, C]."""
    if candidates >= len(table_RH):
        return torch.arange(len(table_RH), device=target_BH.device).expand(len(target_BH), -1)
    distance_BR = table_RH.square().sum(-1) - 2 * target_BH @ table_RH.T
    return distance_BR.topk(candidates, largest=False).indices
