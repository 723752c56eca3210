"""The encoder bundle: what training leaves and materialization loads.

`encoder.json` holds the resolved config, the signals and the SID spec; `weights.safetensors` all
weights. The spec's fingerprint is a SHA-256 over everything that decides an id, so two bundles
with one fingerprint give the same ids, and a bundle whose weights were changed is refused.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoder.config import EncoderConfig
from encoder.fusion import VQFusion
from encoder.sid import SidSpec
from encoder.signals import SignalSpec
from infra.config import Config, digest
from infra.errors import DataError, SpecError

ENCODER_FILE = "encoder.json"
WEIGHTS_FILE = "weights.safetensors"


class Description(Config):
    """The content of `encoder.json`."""

    config: EncoderConfig
    signals: SignalSpec
    spec: SidSpec


@dataclass(frozen=True)
class EncoderBundle:
    """A loaded encoder: its network, in evaluation mode, and what its digits mean."""

    model: VQFusion
    config: EncoderConfig
    signals: SignalSpec
    spec: SidSpec


def fingerprint(model: VQFusion, config: EncoderConfig) -> str:
    """Give the SHA-256 (hex) over all that decides an id: shapes, codebook and encoder weights.

    The decoder is left out: it decides no id. Tensors are taken in the order of their names.
    """
    deciding = {
        "signals": {"embeddings": model.signals.embeddings, "categoricals": model.signals.categoricals},
        "network": config.network.model_dump(mode="json"),
        "quantizer": config.quantizer.model_dump(mode="json"),
    }
    sha = hashlib.sha256(digest(deciding).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quantizer.")):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def save_bundle(out: Path, model: VQFusion, config: EncoderConfig) -> SidSpec:
    """Write the bundle's two files into a directory, and give its SID spec."""
    spec = model.quantizer.sid_spec(fingerprint(model, config))
    description = Description(config=config, signals=model.signals, spec=spec)
    (out / ENCODER_FILE).write_text(description.model_dump_json(indent=1) + "\n")
    save_file({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}, out / WEIGHTS_FILE)
    return spec


def load_bundle(path: Path, device: torch.device) -> EncoderBundle:
    """Load a bundle and hold its weights against its fingerprint.

    Raises:
        DataError: a file is missing or not what it should be.
        SpecError: the weights are not those the fingerprint was taken of.
    """
    try:
        description = Description.model_validate_json((path / ENCODER_FILE).read_bytes())
        weights = load_file(path / WEIGHTS_FILE)
    except (OSError, ValidationError, SafetensorError) as error:
        raise DataError(f"{path}: not an encoder bundle: {error}") from error
    model = VQFusion(description.config, description.signals)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{path / WEIGHTS_FILE}: does not fit {ENCODER_FILE}: {error}") from error
    found = fingerprint(model, description.config)
    if found != description.spec.fingerprint:
        raise SpecError(
            f"{path / WEIGHTS_FILE}: fingerprint of these weights is {found[:16]}…, {ENCODER_FILE} says"
            f" {description.spec.fingerprint[:16]}…"
        )
    return EncoderBundle(model.to(device).eval(), description.config, description.signals, description.spec)
