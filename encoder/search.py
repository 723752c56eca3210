"""Encoding by search: digits refined by coordinate descent through the decoder.

Rounding takes the digits whose codewords are nearest in the latent space; what counts is how well
the decoder gives the signals back. So each digit in turn tries other values, the rest held, and
keeps the one of least loss; a few passes over the digits are enough. Nothing is trained anew. The
price is rounds x digits x candidates runs of the decoder an item.
"""

from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from encoder.signals import SignalBatch
from infra.config import Config

if TYPE_CHECKING:
    from encoder.fusion import VQFusion


class SearchConfig(Config):
    """How far digits are searched when items are encoded."""

    rounds: Annotated[int, Field(ge=0)] = 0
    """Passes over the digits; 0 takes them as they were rounded."""
    candidates: PositiveInt = 16
    """Values that a digit tries: those that bring h_hat nearest to h. All, where it has no more."""


@torch.no_grad()
def searched(
    model: "VQFusion", batch: SignalBatch, h_BH: Tensor, digits_BN: Tensor, config: SearchConfig
) -> tuple[Tensor, Tensor]:
    """Refine digits by coordinate descent on the weighted loss of a row's signals.

    A digit changes only where another value is strictly better, so the loss never rises.

    Args:
        model: the auto-encoder, whose decoder and loss weights judge.
        batch: the signals. h_BH: their latent vectors, bounded. digits_BN: where to start.
        config: how far.

    Returns:
        digits int64 [B, digits], and their loss [B].
    """
    table_NRH = model.quantizer.codewords().detach()
    digits_BN = digits_BN.clone()
    h_hat_BH = model.quantizer.decode(digits_BN)
    loss_B = _losses(model, batch, h_hat_BH[:, None]).squeeze(1)
    for _ in range(config.rounds):
        for n, table_RH in enumerate(table_NRH):
            rest_BH = h_hat_BH - table_RH[digits_BN[:, n]]
            tried_BC = _nearest(h_BH - rest_BH, table_RH, config.candidates)
            losses_BC = _losses(model, batch, rest_BH[:, None] + table_RH[tried_BC])
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


def _losses(model: "VQFusion", batch: SignalBatch, h_hat_BCH: Tensor) -> Tensor:
    """Return the weighted loss of every row's candidates, [B, C]."""
    rows, candidates, _ = h_hat_BCH.shape
    answer = model.decoder(h_hat_BCH.flatten(0, 1))
    losses_KX = model.row_losses(batch.repeated(candidates), answer)
    return (model.weights_K @ losses_KX).view(rows, candidates)
