"""Reconstruction loss of the signals of new items, compared with that of old ones."""

import numpy as np
import numpy.typing as npt

from sidestack.encoder.bundle import EncoderBundle
from sidestack.encoder.evaluation import evaluate
from sidestack.encoder.newest import newest_signals
from sidestack.infra.distributed import ALONE
from sidestack.infra.snapshot import Dataset
from sidestack.pipelines.drift.config import DriftConfig
from sidestack.pipelines.drift.result import SignalLoss


def reconstruct(bundle: EncoderBundle, now: Dataset, known: int, config: DriftConfig) -> dict[str, SignalLoss]:
    """Measure every signal's loss on samples of new and of old items (users), using each item's newest row.

    Args:
        bundle: the encoder. now: the snapshot.
        known: how many items (users) are old: higher ids are new.
        config: how many are drawn.

    Raises:
        DataError: the snapshot does not fit the encoder, or rows break the tables' contract.
    """
    signals = bundle.signals
    signals.require(now.spec, now.path)
    rows = now.spec.content(signals.entity).rows
    rng = np.random.default_rng(config.seed)
    new, old = (
        _losses(bundle, now, _drawn(low, high, config.sample_items, rng)) for low, high in ((known, rows), (0, known))
    )
    return {name: SignalLoss.of(new.get(name), old.get(name)) for name in signals.names}


def _drawn(low: int, high: int, number: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw distinct ids in [low, high); return all if there are no more."""
    return low + rng.choice(high - low, min(number, high - low), replace=False)


def _losses(bundle: EncoderBundle, now: Dataset, ids_N: npt.NDArray[np.int64]) -> dict[str, float]:
    """Return the mean loss of each signal that some of the items have."""
    if not len(ids_N):
        return {}
    measured = evaluate(bundle.model, newest_signals(now, bundle.signals, ids_N), ALONE)
    return {name: one["loss"] for name, one in measured["signals"].items()}
