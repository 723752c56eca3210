"""Encoders trained by the product's own stage, several at once, each only once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sidestack.encoder.config import EncoderConfig
from sidestack.infra.code import ROOT, code_digest
from sidestack.infra.config import digest, load_section, plain
from sidestack.infra.errors import StageError
from sidestack.infra.manifest import is_committed, read_manifest
from sidestack.infra.record import SUMMARY_FILE

METHODS: dict[str, dict[str, Any]] = {
    "dpca": {"kind": "structured", "levels": 3, "groups": 3, "depth": 5},
    "fsq": {"kind": "fsq", "levels": 3, "digits": 15},
    "rq": {"kind": "rqvae", "codes": 256, "depth": 3, "groups": 1},
}
"""The quantizers of Table 1 at 24 bits: 15 ternary digits, or 3 codebooks of 256."""

ONE_EACH, FUSION = "1:1", "fusion"


@dataclass(frozen=True)
class Training:
    """One encoder to train.

    Attributes:
        method: a name of `METHODS`.
        signals: weight of each signal.
        seed: seed of its weights and of the order of rows.
        corpus: the committed dataset.
    """

    method: str
    signals: tuple[tuple[str, float], ...]
    seed: int
    corpus: Path

    def settings(self, epochs: int, share: float) -> dict[str, Any]:
        """Return the content of its run's configuration file."""
        training = {"epochs": epochs, "batch_size": 256, "seed": self.seed, "holdout_share": share}
        return {
            "encoder": {"signals": dict(self.signals), "quantizer": METHODS[self.method], "training": training},
        }

    def __str__(self) -> str:
        """Return its name for messages."""
        return f"{self.method} of {', '.join(name for name, _ in self.signals)}, seed {self.seed}"


class Trainer:
    """A runner of `python -m encoder.train` for trainings without an output yet."""

    def __init__(self, cache: Path, epochs: int, share: float, overrides: Sequence[str]) -> None:
        """Set what all encoders share.

        Args:
            cache: directory of the outputs, which are named by the digest of settings, corpus and code.
            epochs: passes over the corpus. share: held-out share of the items.
            overrides: dotted `encoder.key=value`, over everything else.
        """
        self._cache = cache
        self._epochs = epochs
        self._share = share
        self._overrides = list(overrides)
        # Computed once: editing a file while the benchmark runs must not split its results.
        self._code = code_digest(("infra", "encoder"))

    def all(self, trainings: Sequence[Training], jobs: int) -> dict[Training, Path]:
        """Return every training's committed output, running missing trainings, `jobs` at a time.

        Raises:
            StageError: a training failed; those already running are finished first.
            ConfigError: a setting is not one of the encoder's.
        """
        places = {training: self._place(training) for training in dict.fromkeys(trainings)}
        missing = [training for training, out in places.items() if not is_committed(out)]
        # The longest first, so that the last ones to end are short.
        missing.sort(key=lambda training: -len(training.signals))
        _print_progress(f"{len(places) - len(missing)} encoders are there, {len(missing)} to be trained")
        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(self._train, training, places[training]) for training in missing]
            try:
                for number, (training, result) in enumerate(zip(missing, waiting, strict=True), start=1):
                    _print_progress(f"{number} of {len(missing)}: {training}: {result.result():.0f} s")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return places

    def _place(self, training: Training) -> Path:
        config = load_section(EncoderConfig, self._file(training), "encoder", self._overrides)
        work = {"encoder": plain(config), "corpus": read_manifest(training.corpus).digest, "code": self._code}
        return self._cache / "encoders" / digest(work)[:16]

    def _file(self, training: Training) -> Path:
        values = training.settings(self._epochs, self._share)
        file = self._cache / "configs" / f"{digest(values)[:16]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return file

    def _train(self, training: Training, out: Path) -> float:
        started = time.monotonic()
        overrides = [word for override in self._overrides for word in ("--set", override)]
        command = [
            *(sys.executable, "-m", "sidestack.encoder.train", "--config", f"{self._file(training)}", *overrides),
            *("--input", f"dataset={training.corpus}", "--out", f"{out}"),
        ]
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise StageError(f"{training}: {' '.join(command)}\n{ended.stderr.strip()[-2000:]}")
        return time.monotonic() - started


def read_summary(out: Path) -> dict[str, Any]:
    """Return a training's summary."""
    summary: dict[str, Any] = json.loads((out / SUMMARY_FILE).read_text(encoding="utf-8"))
    return summary


def _print_progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
