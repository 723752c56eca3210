"""Diagnosis of a non-finite training step: which signal, in which file and row group."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalBatch
from sidestack.infra.parquet import RowGroup

_MOST_GROUPS = 4


@torch.no_grad()
def diagnosis(model: VQFusion, batch: SignalBatch, rows_B: npt.NDArray[np.int64], groups: Sequence[RowGroup]) -> str:
    """Find the rows of a batch with non-finite losses, by recomputing the losses.

    Args:
        model: the auto-encoder, before the step. batch: this rank's signals.
        rows_B: the rows' global numbers, [B]. groups: the row groups they come from.

    Returns:
        for each row group with such rows: file, row group, first row, and signals with their losses;
        if all losses are finite, the parameter whose gradient is not, and the batch's row groups.
    """
    h_BH = model.encoder(batch)
    losses_KB = _losses(model, batch, h_BH)
    bad_B = ~(torch.isfinite(losses_KB).all(0) & torch.isfinite(h_BH).all(1))
    if not bad_B.any():
        return (
            f"its losses are finite, {_bad_gradient(model)}: {_listed([str(g) for g in _groups_with(groups, rows_B)])}"
        )
    bad_rows_N, bad_KN = rows_B[bad_B.cpu().numpy()], losses_KB[:, bad_B].cpu()
    found = []
    for group in _groups_with(groups, bad_rows_N):
        inside_N = (bad_rows_N >= group.start) & (bad_rows_N < group.start + group.rows)
        first = int(bad_rows_N[inside_N].min()) - group.start
        named = _describe_losses(model, bad_KN[:, torch.from_numpy(inside_N)])
        found.append(f"{group}, {int(inside_N.sum())} rows from its row {first} on: {named}")
    return _listed(found)


def finite_or_zero(h_BH: Tensor) -> Tensor:
    """Replace non-finite values in latent vectors by 0; the rest, gradient included, stays as it is."""
    return torch.nan_to_num(h_BH, nan=0.0, posinf=0.0, neginf=0.0)


def _losses(model: VQFusion, batch: SignalBatch, h_BH: Tensor) -> Tensor:
    """Return the losses of every row: each signal's, then codebook and commitment; [K + 2, B]."""
    quantized = model.quantizer(finite_or_zero(h_BH))
    losses_KB = model.row_losses(batch, model.decoder(quantized.straight_through))
    return torch.cat([losses_KB, torch.stack([quantized.codebook_loss(), quantized.commitment_loss()])])


def _describe_losses(model: VQFusion, losses_KN: Tensor) -> str:
    """Return the names of the signals with a non-finite loss, or if there are none, of the other non-finite losses."""
    bad_KN = ~torch.isfinite(losses_KN)
    names = model.signals.names
    bad = [repr(name) for name, is_bad in zip(names, bad_KN.any(1).tolist(), strict=False) if is_bad]
    if bad:
        value = float(losses_KN[: len(names)][bad_KN[: len(names)]][0])
        return f"loss of signal{'s' * (len(bad) > 1)} {', '.join(bad)} is {value}"
    return "codebook or commitment loss is not finite" if bad_KN.any() else "latent vectors are not finite"


def _bad_gradient(model: VQFusion) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"but the gradient of {name} is not"
    return "but those of another rank, or a gradient, are not"


def _groups_with(groups: Sequence[RowGroup], rows_N: npt.NDArray[np.int64]) -> list[RowGroup]:
    return [group for group in groups if ((rows_N >= group.start) & (rows_N < group.start + group.rows)).any()]


def _listed(found: list[str]) -> str:
    more = len(found) - _MOST_GROUPS
    return "; ".join(found[:_MOST_GROUPS]) + (f"; and in {more} more row groups" if more > 0 else "")
