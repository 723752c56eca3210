"""Jobs of the ranker's stages, including the baseline: `torchx run components/ranker.py:train --help`."""

# torchx 0.7.0's linter accepts only these spellings of types.
# ruff: noqa: UP006, UP035, UP045

from typing import Any, Dict, Optional

from torchx import specs

from sidestack.components.stage import NO_TRAINING, ONE_RANK, component, stage_job


@component(stage_job)
def train(*overrides: str, dataset: str, arm: str = "", start: str = "", **shared: Any) -> specs.AppDef:
    """Train and evaluate the ranker of one arm.

    Args:
        dataset: committed output of materialize
        arm: one of the file's arms, such as none or side; by default the one that the file selects
        start: committed output of an earlier training to warm-start from; by default none
    """
    chosen = (f"ranker.arm={arm}",) if arm else ()
    return stage_job(
        "ranker", "sidestack.ranker.train", {"dataset": dataset, "start": start}, *overrides, *chosen, **shared
    )


@component(stage_job, ONE_RANK)
def baseline(*overrides: str, dataset: str, **shared: Any) -> specs.AppDef:
    """Train and evaluate the baseline: gradient boosting on the ranker's rows, in one process on CPU cores.

    Args:
        dataset: committed output of materialize
    """
    return stage_job("baseline", "sidestack.ranker.baseline", {"dataset": dataset}, *overrides, **shared)


@component(stage_job, NO_TRAINING)
def score(*overrides: str, model: str, dataset: str, **shared: Any) -> specs.AppDef:
    """Predict every row of a snapshot with a trained ranker, part by part.

    Args:
        model: committed output of a ranker's training
        dataset: committed output of materialize
    """
    return stage_job("score", "sidestack.ranker.score", {"model": model, "dataset": dataset}, *overrides, **shared)


@component(stage_job, ONE_RANK)
def export(
    *overrides: str, model: str, dataset: str, encoders: Optional[Dict[str, str]] = None, **shared: Any
) -> specs.AppDef:
    """Save ranker, SIDs and encoders as one MLflow model, check it on held-out rows, and register it.

    Args:
        model: committed output of a ranker's training
        dataset: committed output of materialize that it was trained on
        encoders: committed encoders of the SIDs that the arm takes, as sid=DIR
        env: environment variables, as A=1,B=2; MLFLOW_TRACKING_URI says where to register
    """
    inputs = {"model": model, "dataset": dataset}
    inputs |= {f"encoder.{name}": path for name, path in (encoders or {}).items()}
    return stage_job("ranker_export", "sidestack.ranker.export", inputs, *overrides, **shared)
