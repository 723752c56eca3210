"""Jobs of the ranker's stages, the baseline's among them: `torchx run components/ranker.py:train --help`."""

# torchx 0.7.0's linter knows only these spellings of types.
# ruff: noqa: UP006, UP035, UP045

from typing import Dict, List, Optional

from torchx import specs

from components.torchrun import Launch, stage_app


def train(
    *overrides: str,
    config: str,
    dataset: str,
    out: str,
    arm: str = "",
    start: str = "",
    key: str = "",
    parent_run: str = "",
    j: str = "",
    cluster: str = "",
    image: str = "",
    cpu: int = 0,
    gpu: int = -1,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Train and evaluate the ranker of one arm.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as ranker.key=value
        config: the run's YAML file, or the stage's resolved one
        dataset: committed output of materialize
        out: the directory to commit; it must be free
        arm: which of the arms that the file names, such as none or side; by default the one it chooses
        start: committed output of an earlier training that this one goes on from; by default none
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}; by default one node, with a rank for each GPU
        cluster: name or path of the cluster's file, which has the defaults of what follows
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; -1 is the cluster's, 0 hides those there are. With one for each rank the stage uses nccl
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun starts the ranks anew after a failure
        max_retries: how often the scheduler runs the whole job anew
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    return stage_app(
        "ranker",
        "ranker.train",
        launch,
        config=config,
        out=out,
        inputs={"dataset": dataset, "start": start} if start else {"dataset": dataset},
        overrides=[*overrides, f"ranker.arm={arm}"] if arm else overrides,
        key=key,
        parent_run=parent_run,
    )


def baseline(
    *overrides: str,
    config: str,
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
    """Train and evaluate the baseline: gradient boosting on the ranker's rows, by one process on CPU cores.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as baseline.key=value
        config: the run's YAML file, or the stage's resolved one
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
    return stage_app(
        "baseline",
        "ranker.baseline",
        launch,
        config=config,
        out=out,
        inputs={"dataset": dataset},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def score(
    *overrides: str,
    config: str,
    model: str,
    dataset: str,
    out: str,
    key: str = "",
    parent_run: str = "",
    j: str = "",
    cluster: str = "",
    image: str = "",
    cpu: int = 0,
    gpu: int = -1,
    memMB: int = 0,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_restarts: int = 0,
    max_retries: int = 0,
) -> specs.AppDef:
    """Predict every row of a snapshot with a trained ranker, part by part.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as score.key=value
        config: the run's YAML file, or the stage's resolved one
        model: committed output of a ranker's training
        dataset: committed output of materialize
        out: the directory to commit; it must be free
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}; by default one node, with a rank for each GPU
        cluster: name or path of the cluster's file, which has the defaults of what follows
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; -1 is the cluster's, 0 hides those there are. With one for each rank the stage uses nccl
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun starts the ranks anew after a failure
        max_retries: how often the scheduler runs the whole job anew
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    return stage_app(
        "score",
        "ranker.score",
        launch,
        config=config,
        out=out,
        inputs={"model": model, "dataset": dataset},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def export(
    *overrides: str,
    config: str,
    model: str,
    dataset: str,
    out: str,
    encoders: Optional[Dict[str, str]] = None,
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
    """Save ranker, SIDs and encoders as one MLflow model, check it on held-out rows, and register it.

    Args:
        overrides: dotted settings over the file's, such as ranker_export.key=value
        config: the run's YAML file, or the stage's resolved one
        model: committed output of a ranker's training
        dataset: committed output of materialize that it was trained on
        out: the directory to commit; it must be free
        encoders: committed encoders of the SIDs that the arm takes, as sid=DIR
        key: the digest that names this work, saved in the manifest
        parent_run: the MLflow run to log a child run under
        j: {nodes}x{ranks a node}; one rank does the work
        cluster: name or path of the cluster's file, which has the defaults of what follows
        image: the container image, where the scheduler uses one
        cpu: CPU cores a node; 0 is the cluster's, or 2
        gpu: GPUs a node; the work needs none
        memMB: memory a node, in MB; 0 is the cluster's, or 6144
        env: environment variables, as A=1,B=2; MLFLOW_TRACKING_URI says where to register
        mounts: mounts, as type=bind,src=/shared,dst=/shared
        max_restarts: how often torchrun starts the ranks anew after a failure
        max_retries: how often the scheduler runs the whole job anew
    """
    launch = Launch.of(j, image, cpu, gpu, memMB, env, mounts, max_restarts, max_retries, cluster)
    of_sids = {f"encoder.{name}": path for name, path in (encoders or {}).items()}
    return stage_app(
        "ranker_export",
        "ranker.export",
        launch,
        config=config,
        out=out,
        inputs={"model": model, "dataset": dataset, **of_sids},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )
