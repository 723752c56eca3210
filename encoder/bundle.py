"""The encoder bundle: the files that training writes and materialization loads.

`encoder.json` holds the resolved config, the signals, the SID spec, and the version of sidestack that wrote it;
`weights.safetensors` all weights. A bundle's *revision* is a SHA-256 over everything that decides an id, so two bundles
of one revision produce the same ids, and a bundle whose weights were changed is refused. The spec's *fingerprint* is
the revision of the encoder that began the generation. A refreshed encoder (`encoder.refresh`) keeps it, because its
codes mean the same. A bundle of an older version loads if every field that it lacks has a default; its revision is
computed from the settings as they were written.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import VERSION, Config, digest, parse_written, plain
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.tables import read_json
from sidestack.infra.tensors import write_tensors

ENCODER_FILE = "encoder.json"
WEIGHTS_FILE = "weights.safetensors"


class Description(Config):
    """The content of `encoder.json`."""

    config: EncoderConfig
    signals: SignalSpec
    spec: SidSpec
    version: str = ""
    """The version of sidestack that wrote the file; empty where it is not recorded."""
    revision: str = ""
    """SHA-256 of all that decides the ids of a refreshed encoder. Empty: equal to the spec's fingerprint."""
    refreshed_from: tuple[str, ...] = ()
    """The earlier revisions of a refreshed encoder, starting with the one that began the generation."""
    weights: str = ""
    """SHA-256 of the weights file, including weights that decide no id; empty where it is not recorded."""

    @property
    def lineage(self) -> tuple[str, ...]:
        """All revisions from the encoder that began the generation to this one."""
        return (*self.refreshed_from, self.revision or self.spec.fingerprint)


@dataclass(frozen=True)
class EncoderBundle:
    """A loaded encoder: its network, in evaluation mode, and the spec of its digits.

    Attributes:
        lineage: the revisions from the encoder that began the generation to this one.
    """

    model: VQFusion
    config: EncoderConfig
    signals: SignalSpec
    spec: SidSpec
    lineage: tuple[str, ...]

    @property
    def revision(self) -> str:
        """The SHA-256 (hex) of all that decides this encoder's ids; the spec's fingerprint unless it was refreshed."""
        return self.lineage[-1]


def fingerprint(model: VQFusion, config: EncoderConfig | Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) over all that decides an id: shapes, codebook and encoder weights.

    The decoder and the signals' weights decide ids only where digits are searched by the decoder's loss. Tensors are
    hashed in the order of their names.

    Args:
        model: the network. config: its settings, or the JSON-ready data of them that an older version wrote.
    """
    settings = plain(config)
    deciding: dict[str, Any] = {
        "signals": {"embeddings": model.signals.embeddings, "categoricals": model.signals.categoricals},
        "network": settings["network"],
        "quantizer": settings["quantizer"],
    }
    parts: tuple[str, ...] = ("encoder.", "quantizer.")
    if settings["search"]["rounds"]:
        deciding |= {"search": settings["search"], "weights": model.signals.weights}
        parts = ("decoder.", *parts)
    sha = hashlib.sha256(digest(deciding).encode())
    _add_state(sha, model, parts)
    return sha.hexdigest()


def codebook_digest(model: VQFusion) -> str:
    """Return the SHA-256 (hex) over the quantizer's weights and buffers alone."""
    sha = hashlib.sha256()
    _add_state(sha, model, ("quantizer.",))
    return sha.hexdigest()


def network_digest(model: VQFusion) -> str:
    """Return the SHA-256 (hex) over the weights of the networks around the quantizer."""
    sha = hashlib.sha256()
    _add_state(sha, model, ("encoder.", "decoder."))
    return sha.hexdigest()


def _add_state(sha: "hashlib._Hash", model: VQFusion, prefixes: tuple[str, ...]) -> None:
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(prefixes):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def save_bundle(out: Path, model: VQFusion, config: EncoderConfig, start: EncoderBundle | None = None) -> Description:
    """Write the bundle's two files into a directory, and return the content of `encoder.json`.

    Args:
        out: the directory. model: the network. config: its settings.
        start: the encoder that it was refreshed from; None: it begins a generation.
    """
    revision = fingerprint(model, config)
    spec = model.quantizer.sid_spec(start.spec.fingerprint if start else revision)
    write_tensors(model.state_dict(), out / WEIGHTS_FILE)
    description = Description(
        config=config,
        signals=model.signals,
        spec=spec.model_copy(update={"entity": model.signals.entity}),
        version=VERSION,
        revision=revision if start else "",
        refreshed_from=start.lineage if start else (),
        weights=hashlib.sha256((out / WEIGHTS_FILE).read_bytes()).hexdigest(),
    )
    (out / ENCODER_FILE).write_text(description.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return description


def load_bundle(path: Path, device: torch.device) -> EncoderBundle:
    """Load a bundle and check the loaded weights against its revision and the digest of their file.

    Raises:
        DataError: a file is missing or invalid; where `encoder.json` cannot be read, names the version that wrote it
            and the one that reads it.
        SpecError: the weights do not match the revision, or the fingerprint is not that of the first encoder in the
            lineage.
    """
    try:
        values = read_json(path / ENCODER_FILE)
        description = parse_written(Description, values, ENCODER_FILE, values.get("version"))
        content = (path / WEIGHTS_FILE).read_bytes()
        weights = load(content)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: not an encoder bundle: {error}") from error
    model = VQFusion(description.config, description.signals)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{path / WEIGHTS_FILE}: does not fit {ENCODER_FILE}: {error}") from error
    found, lineage = fingerprint(model, values["config"]), description.lineage
    if found != lineage[-1]:
        raise SpecError(
            f"{path / WEIGHTS_FILE}: fingerprint of these weights is {found[:16]}…, {ENCODER_FILE} says"
            f" {lineage[-1][:16]}…"
        )
    if lineage[0] != description.spec.fingerprint:
        raise SpecError(
            f"{path / ENCODER_FILE}: the SIDs have fingerprint {description.spec.fingerprint[:16]}…, the encoder that"
            f" began the generation is {lineage[0][:16]}…"
        )
    if description.weights not in (hashlib.sha256(content).hexdigest(), ""):
        raise DataError(f"{path / WEIGHTS_FILE}: SHA-256 is not {ENCODER_FILE}'s: the file was altered")
    return EncoderBundle(model.to(device).eval(), description.config, description.signals, description.spec, lineage)
