"""Contests of arms on synthetic logs with known truth: the stages of a run, executed in this process."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestack.encoder.config import EncoderConfig, MaterializeConfig
from sidestack.encoder.materialize import materialize
from sidestack.encoder.train import train as train_encoder
from sidestack.infra.config import Config, to_yaml
from sidestack.infra.distributed import ALONE
from sidestack.infra.manifest import is_committed
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.compare import compare_arms
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.stage import prepare
from sidestack.pipelines.report.arms import arms_of, input_name
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.outputs import read_curves
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.train import train as train_ranker

REFERENCE = "none"
SIGNALS = {"sid": "content", "exchanged": "exchanged_content"}
"""SIDs -> the embedding that they encode: one that explains clicks, and one that was exchanged between items."""
ARMS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "side": {"item": "side", "history": "side"},
    "side_exchanged": {"item": "side", "history": "side", "sids": ["exchanged"]},
}
TRAIN_DAYS, TEST_DAYS = 8, 4
NUM_CLUSTERS, NUM_SUBCLUSTERS = 4, 2
"""Few clusters, so that 10,000 events are enough to learn from."""
DIM = 32
MAX_HISTORY = 8
MODEL = {
    "embedding_dim": 16, "dense_hidden": 16, "content_hidden": 32, "cross_rank": 16, "over_arch": [32, 16],
    "tower_hidden": 16,
}  # fmt: skip
TRAINING = {"epochs": 1, "sparse_learning_rate": 0.05, "dense_learning_rate": 0.01, "checkpoint_every": 0}
"""The batch size is by rule. One epoch is what the rule's search chose on a log of 10,000 events, at three times the
steps. The dense rate is ten times the default: within 100 steps, `none` hardly beat the base rate at lower rates."""
ENCODER_EPOCHS = 2


@dataclass(frozen=True)
class LogSize:
    """Numbers of impressions, items and users of the whole log."""

    events: int
    items: int
    users: int


class Contest:
    """Arms trained on one log, several times.

    Args of the constructor:
        folder: for all outputs; stages whose outputs are there are not run again.
        size: of the log. seed: of the log; the trainings' seeds follow from it.
        replicates: number of trainings per arm.
    """

    def __init__(self, folder: Path, size: LogSize, seed: int, replicates: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dataset: dict[str, Path] = {}
        self._trained: list[dict[str, Path]] = []
        # About 100 steps per epoch in large catalogues; with fewer items than a batch there would be no step.
        self._encoder_batch = min(max(64, size.items // 512 * 8), 1024)
        prepared = self._stage("prepare", "prepare", PrepareConfig, {"source": source(size, seed)}, {}, prepare)
        for replicate in range(replicates):
            self._train(prepared, replicate, seed * replicates + replicate)

    def comparison(self, replicates: int) -> Comparison:
        """Return the comparison of the first `replicates` trainings of each arm."""
        inputs = dict(self._dataset)
        for trained in self._trained[:replicates]:
            inputs |= trained
        arms = arms_of(inputs, REFERENCE)
        curves = {name: [read_curves(path) for path in paths] for name, paths in arms.items()}
        return compare_arms(StageRun(CompareConfig(), inputs, self._folder, ALONE, RunLog(None)), arms, curves)

    def _train(self, prepared: Path, replicate: int, seed: int) -> None:
        """Train encoders and arms from one seed."""
        encoders = {
            f"encoder.{sids}": self._encoder(prepared, f"encoder-{sids}-{replicate}", signal, seed)
            for sids, signal in SIGNALS.items()
        }
        inputs = {"dataset": prepared, **encoders}
        values = {"prefix_lengths": dict.fromkeys(SIGNALS, ())}
        dataset = self._stage(f"sids-{replicate}", "materialize", MaterializeConfig, values, inputs, materialize)
        if not self._dataset:
            self._dataset = {"dataset": dataset, **encoders}
        self._trained.append(
            {input_name(arm, replicate): self._ranker(dataset, f"{arm}-{replicate}", arm, seed) for arm in ARMS}
        )

    def _encoder(self, prepared: Path, label: str, signal: str, seed: int) -> Path:
        training = {"epochs": ENCODER_EPOCHS, "batch_size": self._encoder_batch, "checkpoint_every": 0, "seed": seed}
        values = {"signals": {signal: 1.0}, "training": training}
        return self._stage(label, "encoder", EncoderConfig, values, {"dataset": prepared}, train_encoder)

    def _ranker(self, dataset: Path, label: str, arm: str, seed: int) -> Path:
        values = {"arm": arm, "arms": ARMS, "model": MODEL, "training": {**TRAINING, "seed": seed}}
        return self._stage(label, "ranker", RankerConfig, values, {"dataset": dataset}, train_ranker)

    def _stage(
        self,
        label: str,
        section: str,
        kind: type[Config],
        values: Mapping[str, Any],
        inputs: Mapping[str, Path],
        body: Callable[[StageRun[Any]], None],
    ) -> Path:
        """Run a stage as its own program does, unless its output exists, and return the output."""
        config, out = self._folder / f"{label}.yaml", self._folder / label
        if is_committed(out):
            return out
        config.write_text(to_yaml({section: dict(values)}), encoding="utf-8")
        given = [f"--input={name}={path}" for name, path in inputs.items()]
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            run_stage(section, section, kind, list(inputs), body, [f"--config={config}", *given, f"--out={out}"])
        return out


def source(size: LogSize, seed: int) -> dict[str, Any]:
    """Return the settings of a log whose items have content that explains clicks and content that does not."""
    return {
        "kind": "synthetic",
        "seed": seed,
        "num_items": size.items,
        "num_users": size.users,
        "train_days": TRAIN_DAYS,
        "test_days": TEST_DAYS,
        "events_per_day": size.events // (TRAIN_DAYS + TEST_DAYS),
        "embeddings": dict.fromkeys(SIGNALS.values(), DIM),
        "exchanged": [SIGNALS["exchanged"]],
        "categoricals": {},
        "num_clusters": NUM_CLUSTERS,
        "num_subclusters": NUM_SUBCLUSTERS,
        "max_history": MAX_HISTORY,
    }
