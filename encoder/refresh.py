"""Training warm-started from an earlier encoder, with the codebook frozen (the policy `refresh` of retraining).

Fusion network, signal encoders and decoders start from the earlier weights and continue training; the quantizer stays
bit for bit the same. A code therefore decodes to the same vector as before, and the SIDs are in the same generation:
rankers, tables and codebooks made for the earlier encoder's SIDs also fit the refreshed encoder's.
"""

from pathlib import Path
from typing import Any

import torch

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import plain
from sidestack.infra.errors import ConfigError


def open_start(path: Path, config: EncoderConfig, signals: SignalSpec) -> EncoderBundle:
    """Load the encoder that a training starts from, and compare it with the encoder to be trained.

    Args:
        path: the output of its stage. config: the training's settings. signals: the signals it takes from the dataset.

    Raises:
        ConfigError: signals, sizes or quantizer differ from the earlier encoder's; names all differences.
        DataError, SpecError: see `load_bundle`.
    """
    bundle = load_bundle(path, torch.device("cpu"))
    was, now = _fixed_settings(bundle.config, bundle.signals), _fixed_settings(config, signals)
    differs = [
        f"{name}: {was.get(name, 'none')} there, {now.get(name, 'none')} here"
        for name in {**was, **now}
        if was.get(name, "none") != now.get(name, "none")
    ]
    if differs:
        raise ConfigError(
            f"start={path}: the codebook can only be kept where signals, sizes and quantizer are the same;"
            f" {'; '.join(differs)}"
        )
    return bundle


def load_start(model: VQFusion, start: EncoderBundle) -> None:
    """Load the earlier weights into a network, and freeze its codebook."""
    model.load_state_dict(start.model.state_dict())
    model.quantizer.freeze()


def _fixed_settings(config: EncoderConfig, signals: SignalSpec) -> dict[str, Any]:
    """Return the settings that a refresh must not change, by the names that users see."""
    return {
        "encoder.entity": signals.entity,
        "encoder.signals": ", ".join(signals.names),  # the order of the network's parts
        **{f"dimensions of {name}": dim for name, dim in signals.embeddings.items()},
        **{f"values of {name}": number for name, number in signals.categoricals.items()},
        **{f"encoder.network.{name}": value for name, value in plain(config.network).items()},
        **{f"encoder.quantizer.{name}": value for name, value in plain(config.quantizer).items()},
    }
