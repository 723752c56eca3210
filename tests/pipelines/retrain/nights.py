"""A small log, retrained night after night: stages are forked and run through their own main programs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from sidestack.benchmarks.forked_launcher import ForkedLauncher
from sidestack.infra.config import parse
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.retrain.cycle import Retraining
from sidestack.pipelines.retrain.ledger import Cycle

FIRST = date(2024, 1, 1)
SMALL: dict[str, Any] = {
    "prepare": {
        "source": {
            "kind": "synthetic", "num_items": 300, "num_users": 200, "events_per_day": 800, "train_days": 6,
            "test_days": 20, "impressions_per_request": 4, "embeddings": {"text_embedding": 16},
            "categoricals": {"category": 8}, "followup_days": 2,
        },
    },
    "encoder": {"training": {"epochs": 2}},
    "ranker": {
        "arm": "side",
        "model": {"embedding_dim": 8, "dense_hidden": 8, "content_hidden": 8, "cross_rank": 8, "over_arch": [16, 8]},
        "training": {"epochs": 1, "batch_size": 64, "sparse_learning_rate": 0.1, "dense_learning_rate": 0.01},
    },
    "baseline": {"enabled": False},
    "retrain": {
        "gates": {"min_positives": 20, "max_ne": 1.2, "max_loss": 0.5, "calibration": {"min": 0.3, "max": 3.0}},
    },
    "run": {"name": "nights"},
}  # fmt: skip
"""A ranker of a few hundred steps passes these gates."""


def laid_over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings overridden by others."""
    both = {
        name: laid_over(values[name], change) if isinstance(change, Mapping) and name in values else change
        for name, change in changes.items()
    }
    return {**values, **both}


def config_in(folder: Path, source: Mapping[str, Any] | None = None, **changes: Any) -> PipelineConfig:
    """Return the small log's configuration with its run in a folder.

    Args:
        folder: of the run. source: another log to use instead. changes: settings that override the sections.
    """
    values = laid_over(SMALL, changes)
    prepare = {"source": source or values["prepare"]["source"], "cache_dir": str(folder / "cache")}
    return parse(
        PipelineConfig, laid_over({**values, "prepare": prepare}, {"run": {"runs_dir": str(folder / "runs")}}), "test"
    )


def night(number: int) -> date:
    """Return the first date that is not known yet in a night; the first night knows 6 dates."""
    return FIRST + timedelta(days=6 + number)


@contextmanager
def retraining(config: PipelineConfig) -> Iterator[Retraining]:
    """Open a run's retraining with a forked launcher."""
    launcher = ForkedLauncher()
    try:
        yield Retraining(config, launcher)
    finally:
        launcher.close()


def run_nights(config: PipelineConfig, nights: range) -> list[Cycle]:
    """Run and return the cycle of each of some nights, opening the run anew for each."""
    found = []
    for number in nights:
        with retraining(config) as one:
            cycle = one.step(night(number))
            assert cycle is not None
            found.append(cycle)
    return found
