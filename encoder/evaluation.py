"""What an encoder is worth: held-out losses by signal, use of the codebook, share of unique SIDs."""

import math
from typing import Any

import torch
from torch import Tensor

from encoder.fusion import VQFusion
from encoder.signals import SignalBatch
from infra.distributed import World, gather, sum_over_ranks

_ROWS = 1024


@torch.no_grad()
def evaluate(model: VQFusion, holdout: SignalBatch, world: World) -> dict[str, Any]:
    """Measure the model on the held-out items of all ranks; every rank gets the same numbers.

    Args:
        model: the auto-encoder. holdout: this rank's held-out items, on the model's device.
        world: the process group.

    Returns:
        `signals.<name>.loss`: mean cosine loss of an embedding, mean cross-entropy (nats) of a
        categorical, over items that have it; `signals.<name>.top1` for categoricals; `digits`: see
        `codebook_use`; `unique_share`: different SIDs by items; `items`: how many were measured.
    """
    spec = model.quantizer.sid_spec("")
    num_signals = len(model.signals.names)
    totals = torch.zeros(3, num_signals, dtype=torch.float64, device=world.device)
    histogram_NL = torch.zeros(spec.digits, spec.radix, dtype=torch.int64, device=world.device)
    ids: list[list[int]] = []
    for batch in holdout.blocks(_ROWS):
        losses = model(batch, len(batch))
        totals += torch.stack([losses.signal_sums, losses.present, losses.correct]).double()
        digits_BN = model.digits(batch)
        histogram_NL += histogram(digits_BN, spec.radix)
        ids += spec.pack(digits_BN[batch.any_present]).tolist()
    totals = sum_over_ranks(world, totals)
    histogram_NL = sum_over_ranks(world, histogram_NL)
    everyone = [tuple(sid) for part in gather(world, ids) for sid in part]
    return {
        "items": len(everyone),
        "unique_share": len(set(everyone)) / max(len(everyone), 1),
        "signals": _by_signal(model, totals.tolist()),
        "digits": codebook_use(histogram_NL),
    }


def _by_signal(model: VQFusion, totals: list[list[float]]) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {}
    for name, loss, present, correct in zip(model.signals.names, *totals, strict=True):
        if not present:
            continue
        measured[name] = {"loss": loss / present}
        if name in model.signals.categoricals:
            measured[name]["top1"] = correct / present
    return measured


def histogram(digits_BN: Tensor, radix: int) -> Tensor:
    """Count each digit's values: int64 [digits, radix]."""
    num_digits = digits_BN.shape[1]
    offsets_N = torch.arange(num_digits, device=digits_BN.device) * radix
    counts = torch.bincount((digits_BN + offsets_N).flatten(), minlength=num_digits * radix)
    return counts.view(num_digits, radix)


def codebook_use(histogram_NL: Tensor) -> dict[str, Any]:
    """Sum up how the values of each digit are used.

    Args:
        histogram_NL: counts [digits, radix].

    Returns:
        `histogram`; `entropy_bits` of each digit, of at most `most_bits`; `dead_share`: the share
        of each digit's values that never occur.
    """
    shares_NL = histogram_NL.double() / histogram_NL.sum(-1, keepdim=True).clamp(min=1)
    entropy_N = -torch.special.xlogy(shares_NL, shares_NL).sum(-1) / math.log(2)
    return {
        "histogram": histogram_NL.tolist(),
        "entropy_bits": entropy_N.tolist(),
        "most_bits": math.log2(histogram_NL.shape[1]),
        "dead_share": (histogram_NL == 0).double().mean(-1).tolist(),
    }
