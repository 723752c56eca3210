"""Jobs of the pipeline's own stages, and of the whole pipeline."""

# torchx 0.7.0's linter knows only these spellings of types.
# ruff: noqa: UP006, UP035, UP045

from collections.abc import Sequence
from dataclasses import replace
from typing import Dict, List, Optional

from torchx import specs

from components.torchrun import Launch, app, quoted, stage_app


def run(
    *overrides: str,
    config: str,
    cluster: str = "",
    image: str = "",
    cpu: int = 2,
    memMB: int = 6144,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Run the whole pipeline: the driver, which launches every stage that is not done.

    The driver runs where this job runs, and launches the stages on the scheduler that the config's
    section `run` names; that scheduler's commands must be at hand there.

    Args:
        overrides: dotted settings over the file's, such as encoder.key=value
        config: the run's YAML file
        cluster: name or path of the cluster's file, which has image, environment and storage
        image: the container image, where the scheduler uses one
        cpu: CPU cores
        memMB: memory, in MB
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
    """
    launch = Launch.of("1x1", image, cpu, 0, memMB, env, mounts, 0, 0, cluster)
    return _driver("pipeline", "pipelines.run", config, overrides, launch)


def retrain(
    *overrides: str,
    config: str,
    cluster: str = "",
    image: str = "",
    cpu: int = 2,
    memMB: int = 6144,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Bring one cycle of retraining: learn what has arrived, and promote the candidate if its gates are open.

    A job to be scheduled as often as wished. It launches the cycle's stages on the scheduler that the config's section
    `run` names, whose commands must be at hand there.

    Args:
        overrides: dotted settings over the file's, such as retrain.every_days=7
        config: the run's YAML file
        cluster: name or path of the cluster's file, which has image, environment and storage
        image: the container image, where the scheduler uses one
        cpu: CPU cores
        memMB: memory, in MB
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
    """
    launch = Launch.of("1x1", image, cpu, 0, memMB, env, mounts, 0, 0, cluster)
    return _driver("retrain", "pipelines.retrain", config, overrides, launch)


def prepare(
    *overrides: str,
    config: str,
    out: str,
    key: str = "",
    parent_run: str = "",
    j: str = "1x1",
    cluster: str = "",
    image: str = "",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Turn a raw log into the tables of the contract: items, users, events.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as prepare.key=value
        config: the run's YAML file, or the stage's resolved one
        out: the directory to commit; it must be free
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}
        cluster: name or path of the cluster's file, which has the defaults of what follows
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; the work needs none
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun starts the ranks anew after a failure
        max_retries: how often the scheduler runs the whole job anew
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    return stage_app(
        "prepare",
        "pipelines.prepare",
        launch,
        config=config,
        out=out,
        inputs={},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def compare(
    *overrides: str,
    config: str,
    arms: Dict[str, str],
    encoders: Dict[str, str],
    prepare: str,
    dataset: str,
    out: str,
    key: str = "",
    parent_run: str = "",
    j: str = "1x1",
    cluster: str = "",
    image: str = "",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Compare trained arms: tables, figures and the report.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as compare.key=value
        config: the run's YAML file, or the stage's resolved one
        arms: committed outputs of ranker by arm, and replicate, as none.0=DIR,side.0=DIR
        encoders: committed outputs of the encoder's training by the name of their SIDs, as sid=DIR
        prepare: committed output of prepare
        dataset: committed output of materialize
        out: the directory to commit; it must be free
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}
        cluster: name or path of the cluster's file, which has the defaults of what follows
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; the work needs none
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun starts the ranks anew after a failure
        max_retries: how often the scheduler runs the whole job anew
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    inputs = {f"arm.{arm}": path for arm, path in arms.items()}
    inputs |= {f"encoder.{name}": path for name, path in encoders.items()}
    inputs |= {"prepare": prepare, "dataset": dataset}
    return stage_app(
        "compare",
        "pipelines.compare",
        launch,
        config=config,
        out=out,
        inputs=inputs,
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def _driver(name: str, module: str, config: str, overrides: Sequence[str], launch: Launch) -> specs.AppDef:
    """Make the job of a driver, which is one process."""
    words = ["exec", "python", "-m", module, "--config", config]
    for override in overrides:
        words += ["--set", override]
    # Stages that run in this job find the GPUs that there are.
    return app(name, [quoted(word) for word in words], replace(launch, gpu=None))
