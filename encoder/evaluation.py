"""Evaluation of an encoder: held-out losses by signal and by prefix, codebook use, share of unique SIDs."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sidestack.encoder.fusion import Reconstruction, VQFusion
from sidestack.encoder.quantizers.usage import count_values
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.signals import SignalBatch, SignalSpec
from sidestack.infra.distributed import World, gather, sum_over_ranks

_ROWS = 1024


@torch.no_grad()
def evaluate(model: VQFusion, holdout: SignalBatch, world: World) -> dict[str, Any]:
    """Measure the model on the held-out items of all ranks; every rank gets the same numbers.

    Args:
        model: the auto-encoder. holdout: this rank's held-out items, on the model's device.
        world: the process group.

    Returns:
        `signals.<name>.loss`: mean cosine loss of an embedding, mean cross-entropy (nats) of a
        categorical, over items that have it, decoded from the digits that would be written;
        `signals.<name>.top1` for categoricals; `prefixes`: for each number of whole depths, its
        `digits` and the `loss` of every signal when the other digits are left out; `digits`: see
        `codebook_use`; `unique_share`: distinct SIDs / items; `items`: how many were measured.
    """
    spec = model.quantizer.sid_spec("")
    num_signals = len(model.signals.names)
    losses_DK = torch.zeros(spec.depth, num_signals, dtype=torch.float64, device=world.device)
    counts_2K = torch.zeros(2, num_signals, dtype=torch.int64, device=world.device)
    histogram_NL = torch.zeros(spec.digits, spec.radix, dtype=torch.int64, device=world.device)
    ids: list[list[int]] = []
    for batch in holdout.blocks(_ROWS):
        digits_BN = model.digits(batch)
        for depth, kept_BN in enumerate(_by_depth(spec, digits_BN)):
            answer = model.reconstruct(digits_BN, kept_BN)
            losses_DK[depth] += model.row_losses(batch, answer).double().sum(1)
        counts_2K += _counts(batch, answer, model.signals)
        histogram_NL += count_values(digits_BN, spec.radix)
        ids += spec.pack(digits_BN[batch.any_present]).tolist()
    present_K, correct_K = sum_over_ranks(world, counts_2K)
    losses_DK = sum_over_ranks(world, losses_DK) / present_K.clamp(min=1)
    everyone = [tuple(sid) for part in gather(world, ids) for sid in part]
    return {
        "items": len(everyone),
        "unique_share": len(set(everyone)) / max(len(everyone), 1),
        "signals": _by_signal(model.signals, losses_DK[-1].tolist(), present_K.tolist(), correct_K.tolist()),
        "prefixes": [
            {"digits": (depth + 1) * spec.groups, "loss": dict(zip(model.signals.names, losses_K, strict=True))}
            for depth, losses_K in enumerate(losses_DK.tolist())
        ],
        "digits": codebook_use(sum_over_ranks(world, histogram_NL)),
    }


def _by_depth(spec: SidSpec, digits_BN: Tensor) -> Iterator[Tensor]:
    """Yield the mask of the digits of the first 1, 2, ... depths: bool [B, digits] each."""
    depth_N = torch.arange(spec.digits, device=digits_BN.device) // spec.groups
    return ((depth_N <= depth).expand_as(digits_BN) for depth in range(spec.depth))


def _counts(batch: SignalBatch, answer: Reconstruction, signals: SignalSpec) -> Tensor:
    """Count the rows that have each signal, and those whose categorical is predicted (embeddings: 0); [2, K]."""
    present_K = torch.stack([batch.present[name].sum() for name in signals.names])
    correct_K = torch.zeros_like(present_K)
    first = len(signals.embeddings)
    for at, (name, logits_BC) in enumerate(zip(signals.categoricals, answer.logits, strict=True), start=first):
        correct_K[at] = ((logits_BC.argmax(-1) == batch.categoricals[name]) & batch.present[name]).sum()
    return torch.stack([present_K, correct_K])


def _by_signal(
    signals: SignalSpec, losses: list[float], present: list[int], correct: list[int]
) -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = {}
    for name, loss, rows, right in zip(signals.names, losses, present, correct, strict=True):
        if not rows:
            continue
        measured[name] = {"loss": loss}
        if name in signals.categoricals:
            measured[name]["top1"] = right / rows
    return measured


def codebook_use(histogram_NL: Tensor) -> dict[str, Any]:
    """Summarize how often each digit's values are used.

    Args:
        histogram_NL: counts [digits, radix].

    Returns:
        `histogram`; for each digit its `entropy_bits` and their maximum `most_bits`; `perplexity`: 2 to the
        entropy, the equivalent number of equally frequent values; `use`: the perplexity on a scale from 1 (use 0)
        to the maximum that so many rows can reach (use 1); `dead_levels`: the number of values that never occur;
        `dead_share`: their share.
    """
    rows_N = histogram_NL.sum(-1)
    radix = histogram_NL.shape[1]
    shares_NL = histogram_NL.double() / rows_N[:, None].clamp(min=1)
    entropy_N = -torch.special.xlogy(shares_NL, shares_NL).sum(-1) / math.log(2)
    perplexity_N = entropy_N.exp2()
    use_N = (perplexity_N - 1) / (rows_N.clamp(min=2, max=radix) - 1)
    dead_N = (histogram_NL == 0).sum(-1)
    return {
        "histogram": histogram_NL.tolist(),
        "entropy_bits": entropy_N.tolist(),
        "most_bits": math.log2(radix),
        "perplexity": perplexity_N.tolist(),
        "use": use_N.tolist(),
        "dead_levels": dead_N.tolist(),
        "dead_share": (dead_N / radix).tolist(),
    }


def as_metrics(measured: dict[str, Any]) -> dict[str, float]:
    """Return the scalars of an evaluation, by the metric names of the history."""
    metrics = {"holdout/unique_share": measured["unique_share"]}
    for name, values in measured["signals"].items():
        metrics |= {f"holdout/{name}/{what}": value for what, value in values.items()}
    for prefix in measured["prefixes"]:
        for name, loss in prefix["loss"].items():
            metrics[f"holdout/prefix_{prefix['digits']:02d}/{name}/loss"] = loss
    for what in ("entropy_bits", "perplexity", "dead_levels"):
        for digit, value in enumerate(measured["digits"][what]):
            metrics[f"holdout/{what}/{digit:02d}"] = value
    dead = measured["digits"]["dead_share"]
    return {**metrics, "holdout/dead_share": sum(dead) / len(dead)}
