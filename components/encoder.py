"""Jobs of the encoder's stages: `torchx run components/encoder.py:train --help`."""

# torchx 0.7.0's linter accepts only these spellings of types.
# ruff: noqa: UP006, UP035

from typing import Any, Dict

from torchx import specs

from sidestack.components.stage import NO_TRAINING, ONE_RANK, component, stage_job


@component(stage_job)
def train(*overrides: str, dataset: str, start: str = "", **shared: Any) -> specs.AppDef:
    """Learn Semantic IDs: train the encoder on the items of a dataset.

    Args:
        dataset: committed output of prepare
        start: committed output of an earlier training to refresh with a frozen codebook; by default none
    """
    return stage_job("encoder", "sidestack.encoder.train", {"dataset": dataset, "start": start}, *overrides, **shared)


@component(stage_job, NO_TRAINING)
def materialize(
    *overrides: str, dataset: str, encoders: Dict[str, str], published: str = "", **shared: Any
) -> specs.AppDef:
    """Add Semantic ID columns to a dataset's tables.

    Args:
        dataset: committed output of prepare
        encoders: committed outputs of the encoder's training by the name of their SIDs, as sid=DIR
        published: committed output of an earlier materialize whose SIDs stay as they are; by default none
    """
    inputs = {"dataset": dataset, **{f"encoder.{name}": path for name, path in encoders.items()}}
    return stage_job(
        "materialize", "sidestack.encoder.materialize", inputs | {"published": published}, *overrides, **shared
    )


@component(stage_job, ONE_RANK)
def export(*overrides: str, encoder: str, sids: str, **shared: Any) -> specs.AppDef:
    """Save the encoder as an MLflow model that serves SIDs, check it against the tables, and register it.

    Args:
        encoder: committed output of the encoder's training
        sids: committed output of materialize, made with that encoder
        env: environment variables, as A=1,B=2; MLFLOW_TRACKING_URI says where to register
    """
    return stage_job("export", "sidestack.encoder.export", {"encoder": encoder, "sids": sids}, *overrides, **shared)
