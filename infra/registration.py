"""A saved model in MLflow's registry: a version of its own, and the alias moved to it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from infra.errors import StageError
from infra.mlflow_runs import URI_VARIABLE, connect, experiment_in
from infra.tracking import RunLog

if TYPE_CHECKING:
    pass

_SQLITE = "sqlite:///"


def register(model: Path, name: str, alias: str, tags: Mapping[str, str], section: str) -> str:
    """Copy a saved model into the store of `MLFLOW_TRACKING_URI`, register it, move the alias to it.

    The copy is the store's own, so the version outlives the directory it was made from. The alias
    moves last: it never points to a model that is not whole.

    Args:
        model: a saved MLflow model. name: the registered model, made where there is none.
        alias: what moves. tags: written to the version. section: of the configuration that names it, for messages.

    Returns:
        the version's number.

    Raises:
        StageError: the store refuses or does not answer.
    """
    from mlflow.exceptions import MlflowException

    client = connect()
    try:
        beside = Path(unquote(os.environ[URI_VARIABLE].removeprefix(_SQLITE))).resolve().parent
        logged = client.create_logged_model(experiment_in(client, name, beside), name=name, tags=dict(tags))
        client.log_model_artifacts(logged.model_id, str(model))
        client.finalize_logged_model(logged.model_id, "READY")
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"models:/{logged.model_id}"
        version = str(client.create_model_version(name, source, tags=dict(tags), model_id=logged.model_id).version)
        client.set_registered_model_alias(name, alias, version)
    except (MlflowException, OSError) as error:
        why, *_ = str(error).splitlines() or [""]
        raise StageError(f"{section}.registered_model {name!r}: {os.environ[URI_VARIABLE]} refuses: {why}") from error
    return version


def registered(
    model: Path, name: str | None, alias: str, tags: Mapping[str, str], section: str, log: RunLog
) -> dict[str, str] | None:
    """Register a stage's model where it has a name and there is a store, and say so.

    Args:
        model, alias, tags, section: see `register`. name: likewise; None: nothing is registered. log: the stage's.

    Returns:
        name, version and alias; None where nothing was registered.

    Raises:
        StageError: see `register`.
    """
    if name is None:
        return None
    if URI_VARIABLE not in os.environ:
        log.say(f"{section}: not registered as {name}: {URI_VARIABLE} is not set")
        return None
    number = register(model, name, alias, tags, section)
    log.say(f"{section}: registered as {name} version {number}; models:/{name}@{alias} is it")
    return {"name": name, "version": number, "alias": alias}
