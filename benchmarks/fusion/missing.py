"""Reconstruction by an encoder of many signals when some are missing at encoding time.

Signals are hidden from the encoder only: the output is compared with all signals that the items have.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.holdout import held_out
from sidestack.encoder.signals import SignalBatch, SignalSpec, concatenated, signal_batch
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.snapshot import read_dataset

Row = dict[str, Any]

GUESS = "one guess"
"""The case of one answer for all items, the reference for an encoder with missing signals."""

_ROWS = 1024


class Case(NamedTuple):
    """The signals that are not hidden from an encoder.

    Attributes:
        label: its name in tables. seen: the signals' names.
    """

    label: str
    seen: tuple[str, ...]


def cases(names: Sequence[str]) -> Iterator[Case]:
    """Yield the cases of the table: all signals, all but one, and one alone."""
    yield Case("all", tuple(names))
    for hidden in names:
        yield Case(f"no {hidden}", tuple(name for name in names if name != hidden))
    for name in names:
        yield Case(f"only {name}", (name,))


def show_only(batch: SignalBatch, seen: Sequence[str]) -> SignalBatch:
    """Return a batch in which all signals except the named ones are missing."""
    return batch.with_present({name: has_B & (name in seen) for name, has_B in batch.present.items()})


@torch.no_grad()
def measure(model: VQFusion, batch: SignalBatch, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the visible signals, decode, and compare with all signals.

    Args:
        model: an encoder in evaluation mode.
        batch: held-out items with all their signals.
        case: the signals that the encoder sees.

    Returns:
        losses, rights and counts, [K] each: summed loss, rows whose categorical is predicted (embeddings: 0), and
        rows, by signal. Items without a visible signal do not count: they would have no SID.
    """
    seen = show_only(batch, case.seen)
    answer = model.reconstruct(model.digits(seen))
    present_KB = torch.stack([batch.present[name] for name in model.signals.names]) & seen.any_present
    losses_KB = model.row_losses(batch, answer) * present_KB
    right_KB = torch.zeros_like(present_KB)
    for name, logits_BC in zip(model.signals.categoricals, answer.logits, strict=True):
        right_KB[model.signals.names.index(name)] = logits_BC.argmax(-1) == batch.categoricals[name]
    return losses_KB.sum(1), (right_KB & present_KB).sum(1), present_KB.sum(1)


def without_unseen(batch: SignalBatch, case: Case) -> SignalBatch:
    """Return a batch with all its signals, except those of items without a visible signal in this case."""
    seen_B = show_only(batch, case.seen).any_present
    return batch.with_present({name: has_B & seen_B for name, has_B in batch.present.items()})


def missing_rows(method: str, outputs: Sequence[Path], corpus: Path, share: float) -> list[Row]:
    """Measure all cases for the encoders of one method, one for each seed.

    Args:
        method: its name, which is in every row.
        outputs: the encoders' committed directories.
        corpus: the dataset they were trained on. share: the held-out share of its items.

    Returns:
        a row for each case and signal: `loss`, `top1` for categoricals (means over encoders), `items`, and `guess`,
        the loss of one answer for all on the same items; and rows of the case `GUESS`, for that answer on all items.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for out in outputs:
        model = load_bundle(out, torch.device("cpu")).model
        held, others = split_items(corpus, model.signals, share)
        for case in cases(model.signals.names):
            parts = [torch.stack(measure(model, part, case)) for part in held.blocks(_ROWS)]
            guess = dict(
                _means(
                    model.signals,
                    torch.stack(measure_constant_guess(model.signals, others, without_unseen(held, case))),
                )
            )
            for name, row in _means(model.signals, torch.stack(parts).sum(0)):
                found.setdefault((case.label, name), []).append(row | {"guess": guess[name]["loss"]})
        for name, row in _means(model.signals, torch.stack(measure_constant_guess(model.signals, others, held))):
            found.setdefault((GUESS, name), []).append(row)
    return [
        {"table": "missing", "method": method, "case": label, "signal": name}
        | {what: fmean(run[what] for run in runs) for what in runs[0]}
        for (label, name), runs in found.items()
    ]


def _means(signals: SignalSpec, sums_3K: Tensor) -> Iterator[tuple[str, Row]]:
    """Yield by signal the means of summed losses and correct answers over the counted items."""
    for name, (loss, right, items) in zip(signals.names, sums_3K.T.tolist(), strict=True):
        if items:
            known = {"top1": right / items} if name in signals.categoricals else {}
            yield name, {"loss": loss / items, **known, "items": int(items)}


def measure_constant_guess(
    signals: SignalSpec, known: SignalBatch, asked: SignalBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the same answer for every item, from the averages of the known items.

    Args:
        signals: which signals.
        known: items to fit the answer to: the mean direction of an embedding, the frequencies of a categorical
            (with one added to each count, so that none is impossible).
        asked: items to evaluate on.

    Returns:
        losses, rights and counts, as `measure` returns them.
    """
    losses, rights = [], []
    for name in signals.embeddings:
        mean_D = functional.normalize(known.embeddings[name][known.present[name]], dim=-1).mean(0)
        x_BD = asked.embeddings[name][asked.present[name]]
        losses.append((1 - functional.cosine_similarity(x_BD, mean_D, dim=-1)).sum())
        rights.append(torch.zeros(()))
    for name, cardinality in signals.categoricals.items():
        ids_B = asked.categoricals[name][asked.present[name]]
        count_C = torch.bincount(known.categoricals[name][known.present[name]], minlength=cardinality) + 1
        losses.append(-(count_C / count_C.sum()).log()[ids_B].sum())
        rights.append((ids_B == count_C.argmax()).sum().float())
    counts = [asked.present[name].sum().float() for name in signals.names]
    return torch.stack(losses), torch.stack(rights), torch.stack(counts)


def split_items(corpus: Path, signals: SignalSpec, share: float) -> tuple[SignalBatch, SignalBatch]:
    """Read the items that training held out, and the remaining ones."""
    held, others = [], []
    for group in row_groups([file.path for file in read_dataset(corpus).content_files("item")]):
        table = read_row_group(group, signals.columns)
        held_N = held_out(np.asarray(table["item_id"].to_numpy()), share)
        held.append(signal_batch(table.filter(held_N), signals))
        others.append(signal_batch(table.filter(~held_N), signals))
    return concatenated(held), concatenated(others)
