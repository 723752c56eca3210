"""Our quantizers, trained as in the product: the stage `encoder.train` as a process, then the bundle it writes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sidestack.benchmarks.quantizers.corpora import SIGNAL, VALIDATION_SHARE
from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.config import SearchConfig
from sidestack.encoder.signals import SignalBatch
from sidestack.infra.errors import StageError
from sidestack.infra.record import SUMMARY_FILE

Vectors = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = 1024


def overrides(settings: Mapping[str, Any], seed: int) -> list[str]:
    """Return settings, the seed and the validation rows' share as the stage's `--set` arguments."""
    fixed = {"encoder.training.seed": seed, "encoder.training.holdout_share": VALIDATION_SHARE}
    return [f"{key}={json.dumps(value)}" for key, value in {**settings, **fixed}.items()]


def train(config: Path, sets: Sequence[str], dataset: Path, out: Path) -> float:
    """Run the stage on one thread and return the training seconds from its summary.

    Raises:
        StageError: the stage failed; the message is the end of its output.
    """
    command = [sys.executable, "-m", "sidestack.encoder.train", "--config", str(config), "--out", str(out)]
    command += ["--input", f"dataset={dataset}"]
    for override in sets:
        command += ["--set", override]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise StageError(f"encoder.train failed: {lines[-1]}")
    return float(json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))["seconds"])


class EncoderCoder:
    """A trained encoder bundle with the one signal `vector`; its loss is a cosine, so lengths are arbitrary."""

    keeps_length = False

    def __init__(self, bundle: Path, *, side: bool, search: SearchConfig | None = None) -> None:
        """Load a bundle.

        Args:
            bundle: the stage's output. side: whether its digits are levels on lines.
            search: the digit search, in place of the bundle's own setting.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_bundle(bundle, self.device)
        self.model = loaded.model
        if search is not None:
            self.model.search = search
        spec = loaded.spec
        self.radix = spec.radix
        # Only whole depths: between them a prefix would describe some blocks more finely than others.
        self.prefixes = tuple(range(spec.groups, spec.digits, spec.groups)) if spec.depth > 1 else ()
        self.centre = spec.centre if side else None
        self.steps = spec.steps if side else ()

    @torch.no_grad()
    def encode(self, x_ND: Vectors) -> Ids:
        """Return the digits, [N, digits]."""
        parts = [self.model.digits(_batch(x_BD).to(self.device)).cpu() for x_BD in _blocks(x_ND)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def decode(self, digits_NK: Ids, prefix: int | None = None) -> Vectors:
        """Decode digits, or only the `prefix` leading ones, to vectors."""
        parts = []
        for digits_BK in _blocks(digits_NK):
            kept_BK = torch.ones(digits_BK.shape, dtype=torch.bool, device=self.device)
            kept_BK[:, prefix:] = prefix is None
            answer = self.model.reconstruct(digits_BK.to(self.device), None if prefix is None else kept_BK)
            parts.append(answer.embeddings[0].float().cpu())
        return torch.cat(parts).numpy()


def _blocks(rows: Vectors | Ids) -> tuple[torch.Tensor, ...]:
    return torch.split(torch.from_numpy(rows), _BLOCK)


def _batch(x_BD: torch.Tensor) -> SignalBatch:
    return SignalBatch({SIGNAL: x_BD}, {}, {SIGNAL: torch.ones(len(x_BD), dtype=torch.bool)})
