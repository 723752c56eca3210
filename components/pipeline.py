"""Jobs of the pipeline's own stages, and of the whole pipeline."""

# torchx 0.7.0's linter accepts only these spellings of types.
# ruff: noqa: UP006, UP035

from typing import Any, Dict

from torchx import specs

from sidestack.components.stage import ONE_RANK, component, driver_job, stage_job


@component(driver_job)
def run(*overrides: str, **shared: Any) -> specs.AppDef:
    """Run the whole pipeline: the driver, which launches every stage that is not done."""
    return driver_job("pipeline", "sidestack.pipelines.run", *overrides, **shared)


@component(driver_job)
def retrain(*overrides: str, **shared: Any) -> specs.AppDef:
    """Run one cycle of retraining: train on the new data, and promote the candidate if it passes its gates.

    Schedule this job as often as needed.
    """
    return driver_job("retrain", "sidestack.pipelines.retrain", *overrides, **shared)


@component(stage_job, ONE_RANK)
def prepare(*overrides: str, **shared: Any) -> specs.AppDef:
    """Turn a raw log into the tables of the contract: items, users, events."""
    return stage_job("prepare", "sidestack.pipelines.prepare", {}, *overrides, **shared)


@component(stage_job, ONE_RANK)
def compare(
    *overrides: str, arms: Dict[str, str], encoders: Dict[str, str], prepare: str, dataset: str, **shared: Any
) -> specs.AppDef:
    """Compare trained arms: tables, figures and the report.

    Args:
        arms: committed outputs of ranker by arm and replicate, as none.0=DIR,side.0=DIR
        encoders: committed outputs of the encoder's training by the name of their SIDs, as sid=DIR
        prepare: committed output of prepare
        dataset: committed output of materialize
    """
    inputs = {f"arm.{arm}": path for arm, path in arms.items()}
    inputs |= {f"encoder.{name}": path for name, path in encoders.items()}
    return stage_job(
        "compare",
        "sidestack.pipelines.compare",
        inputs | {"prepare": prepare, "dataset": dataset},
        *overrides,
        **shared,
    )
