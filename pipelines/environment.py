"""The environment of a stage's job: variables stored with the job, and those inherited or passed by reference.

`run.env` holds values for jobs. They are masked in every copy of the run's file (its folder, MLflow).
`run.secrets` holds names only: the values come from the driver's own environment and are never written.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torchx.specs import AppDef

from sidestack.components.torchrun import RENDEZVOUS_SECONDS_VARIABLE
from sidestack.infra.clusters.config import SECRETS_KEY
from sidestack.infra.code import code_environment
from sidestack.infra.errors import ConfigError
from sidestack.infra.logs import LEVEL_VARIABLE
from sidestack.infra.masking import MASK, has_secret
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.pipelines.run_config import RunConfig

_INHERITING = ("local_cwd", "slurm")
"""Schedulers whose jobs inherit the driver's environment."""
_BY_REFERENCE = ("kubernetes", "aws_batch")
"""Schedulers whose jobs get secrets through the cluster's file; the driver does not need them."""


def job_environment(run: RunConfig, code: Sequence[str] = (), *, is_tracked: bool) -> dict[str, str]:
    """Return the variables that are passed to the scheduler with a stage's job.

    Args:
        run: the run's settings. code: the packages and modules in the stage's key.
        is_tracked: whether the stage logs to the store of `MLFLOW_TRACKING_URI`.
    """
    environment = {**run.timeouts.environment(), RENDEZVOUS_SECONDS_VARIABLE: str(run.rendezvous_s)}
    environment |= code_environment(code)
    environment |= {name: os.environ[name] for name in (LEVEL_VARIABLE,) if name in os.environ}
    if run.scheduler not in _INHERITING:
        # Many people can read a manifest: a URL with a password is passed by reference, or not at all.
        if is_tracked and not has_secret(os.environ[URI_VARIABLE]):
            environment[URI_VARIABLE] = os.environ[URI_VARIABLE]
        if run.scheduler == "local_docker":
            environment |= {name: os.environ[name] for name in run.secrets}
    return {**environment, **run.env}


def name_secrets(app: AppDef, run: RunConfig) -> None:
    """Write the names of `run.secrets` into a job, for schedulers whose jobs inherit nothing."""
    for role in app.roles:
        if run.secrets and run.scheduler not in _INHERITING:
            role.metadata[SECRETS_KEY] = list(run.secrets)


def require_secrets(run: RunConfig) -> None:
    """Check that the driver has the secrets that its jobs inherit.

    Raises:
        ConfigError: a variable of `run.secrets` is not set.
    """
    for name in run.secrets if run.scheduler not in _BY_REFERENCE else ():
        if name not in os.environ:
            raise ConfigError(f"run.secrets: {name}: is not set in the driver's environment")


def without_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's file, or a resolved config, in which the values of `run.env` are masked."""
    run = values.get("run")
    if not isinstance(run, Mapping) or not isinstance(run.get("env"), Mapping):
        return dict(values)
    return {**values, "run": {**run, "env": {name: MASK for name in run["env"]}}}
