"""Jobs of the encoder's stages: `torchx run components/encoder.py:train --help`."""

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
    """Learn Semantic IDs: train the encoder on the items of a dataset.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as encoder.key=value
        config: the run's YAML file, or the stage's resolved one
        dataset: committed output of prepare
        out: the directory to commit; it must be free
        start: committed output of an earlier training that is refreshed, its codebook frozen; by default none
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
        "encoder",
        "encoder.train",
        launch,
        config=config,
        out=out,
        inputs={"dataset": dataset, "start": start} if start else {"dataset": dataset},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def materialize(
    *overrides: str,
    config: str,
    dataset: str,
    encoders: Dict[str, str],
    out: str,
    published: str = "",
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
    """Write a dataset's tables anew, with Semantic ID columns.

    On more than one node, config, inputs and out are paths on a filesystem that all nodes share.

    Args:
        overrides: dotted settings over the file's, such as materialize.key=value
        config: the run's YAML file, or the stage's resolved one
        dataset: committed output of prepare
        encoders: committed outputs of the encoder's training by the name of their SIDs, as sid=DIR
        out: the directory to commit; it must be free
        published: committed output of an earlier materialize whose SIDs stay as they are; by default none
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
    inputs = {"dataset": dataset} | {f"encoder.{name}": path for name, path in encoders.items()}
    return stage_app(
        "materialize",
        "encoder.materialize",
        launch,
        config=config,
        out=out,
        inputs=inputs | {"published": published} if published else inputs,
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )


def export(
    *overrides: str,
    config: str,
    encoder: str,
    sids: str,
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
    """Save the encoder as an MLflow model that serves SIDs, check it against the tables, and register it.

    Args:
        overrides: dotted settings over the file's, such as export.key=value
        config: the run's YAML file, or the stage's resolved one
        encoder: committed output of the encoder's training
        sids: committed output of materialize, made with that encoder
        out: the directory to commit; it must be free
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
    return stage_app(
        "export",
        "encoder.export",
        launch,
        config=config,
        out=out,
        inputs={"encoder": encoder, "sids": sids},
        overrides=overrides,
        key=key,
        parent_run=parent_run,
    )
