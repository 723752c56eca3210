"""Registration of a saved model in MLflow's registry: a new version, and the alias moved to it."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

from sidestack.infra.errors import SidestackError, StageError
from sidestack.infra.masking import masked, one_line
from sidestack.infra.mlflow_runs import experiment_in
from sidestack.infra.mlflow_store import URI_VARIABLE, connect, has_store, longer_timeouts, store_uri
from sidestack.infra.tracking import RunLog

_SQLITE = "sqlite:///"


def register(model: Path, name: str, alias: str, tags: Mapping[str, str], section: str) -> str:
    """Copy a saved model into the store of `MLFLOW_TRACKING_URI`, register it, and move the alias to it.

    The copy belongs to the store, so the version survives the directory it was made from. The alias
    moves last: it never points to an incomplete model.

    Args:
        model: a saved MLflow model. name: the registered model, created if there is none.
        alias: the alias to move. tags: tags of the version. section: the config section with the name, for messages.

    Returns:
        the version's number.

    Raises:
        StageError: the store refuses or does not answer.
    """
    try:
        with longer_timeouts():  # models are large
            return _create_version(model, name, alias, tags)
    except SidestackError:
        raise
    except Exception as error:
        where = masked(store_uri())
        raise StageError(f"{section}.registered_model {name!r}: {where} refuses: {one_line(error)}") from error


def _create_version(model: Path, name: str, alias: str, tags: Mapping[str, str]) -> str:
    client = connect()
    beside = Path(unquote(store_uri().removeprefix(_SQLITE))).resolve().parent
    logged = client.create_logged_model(experiment_in(client, name, beside), name=name, tags=dict(tags))
    client.log_model_artifacts(logged.model_id, str(model))
    client.finalize_logged_model(logged.model_id, "READY")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{logged.model_id}"
    version = str(client.create_model_version(name, source, tags=dict(tags), model_id=logged.model_id).version)
    client.set_registered_model_alias(name, alias, version)
    return version


def register_if_named(
    model: Path, name: str | None, alias: str, tags: Mapping[str, str], section: str, log: RunLog
) -> dict[str, str] | None:
    """Register a stage's model if it has a name and there is a store, and log it.

    Args:
        model, alias, tags, section: see `register`. name: likewise; None: no-op. log: the stage's.

    Returns:
        name, version and alias; None if nothing was registered.

    Raises:
        StageError: see `register`.
    """
    if name is None:
        return None
    if not has_store():
        log.info(f"{section}: not registered as {name}: {URI_VARIABLE} is not set")
        return None
    number = register(model, name, alias, tags, section)
    log.info(f"{section}: registered as {name} version {number}; models:/{name}@{alias} is it")
    return {"name": name, "version": number, "alias": alias}
