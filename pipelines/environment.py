"""The environment of a stage's job: what is written down with the job, and what it only inherits or gets by reference.

`run.env` holds values for jobs. Wherever a run's file is copied to (its folder, MLflow), the values are masked.
`run.secrets` holds names alone: the values are those of the driver's own environment, and are written nowhere.
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
"""Schedulers whose jobs get secrets by the cluster's file; the driver need not have them."""


def job_environment(run: RunConfig, code: Sequence[str] = (), *, is_tracked: bool) -> dict[str, str]:
    """Return the variables that are handed to the scheduler with a stage's job.

    Args:
        run: the run's settings. code: the packages and modules that the stage's key names.
        is_tracked: whether the stage logs to the store of `MLFLOW_TRACKING_URI`.
    """
    environment = {**run.timeouts.environment(), RENDEZVOUS_SECONDS_VARIABLE: str(run.rendezvous_s)}
    environment |= code_environment(code)
    environment |= {name: os.environ[name] for name in (LEVEL_VARIABLE,) if name in os.environ}
    if run.scheduler not in _INHERITING:
        # A manifest is read by many: an address with a password gets there by reference, or not at all.
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
    """Check that the driver has the secrets that its jobs are to inherit.

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
