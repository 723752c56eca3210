"""The tracking store: its choice, connections to it, and timeouts.

Training does not depend on the store. A request waits for some seconds and is not repeated; the sender keeps what was
not sent (`infra.tracking.Mirror`, `infra.journal`).
"""

import logging
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from sidestack.infra.errors import ConfigError
from sidestack.infra.locks import locked
from sidestack.infra.masking import masked, one_line

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")

URI_VARIABLE = "MLFLOW_TRACKING_URI"

_CONNECT_SECONDS = 15.0
_DATABRICKS = ("databricks", "databricks-uc", "uc")
_CLIENT_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URI may contain a password
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_SHORT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}
_PATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "60", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class StoreError(Exception):
    """The tracking store cannot be used; a run continues without it."""


def use_store(runs_dir: Path) -> str:
    """Choose the tracking store for this process and those it starts; return its URI.

    It is `MLFLOW_TRACKING_URI` if that is set and not empty, else an SQLite file in `runs_dir`.

    Raises:
        ConfigError: the variable is not the address of a store.
    """
    if not has_store():
        os.environ[URI_VARIABLE] = store_in(runs_dir)
    return store_uri()


def store_in(folder: Path) -> str:
    """Return the URI of the SQLite store in a folder."""
    path = str(folder.resolve() / "mlflow.db")
    # SQLAlchemy unquotes the path, and reads text after a ? as options.
    return f"sqlite:///{path.replace('%', '%25').replace('?', '%3F')}"


def has_store() -> bool:
    """Return whether `MLFLOW_TRACKING_URI` is set; an empty text counts as unset."""
    return bool(os.environ.get(URI_VARIABLE, "").strip())


def store_uri() -> str:
    """Return the store's URI, which may hold a password.

    Raises:
        ConfigError: it is not the address of a server or a database. KeyError: it is not set; see `use_store`.
    """
    uri = os.environ[URI_VARIABLE].strip()
    try:
        parts = urlsplit(uri)
        is_address = parts.scheme not in ("", "file") and (not parts.scheme.startswith("http") or _has_host(uri))
    except ValueError:  # such as a port that is not a number
        is_address = False
    if not is_address and uri not in _DATABRICKS:
        raise ConfigError(
            f"{URI_VARIABLE} {masked(uri)!r}: must be a server's address, such as http://HOST:5000, or a database's,"
            " such as sqlite:///FILE; MLflow no longer keeps runs in a folder"
        )
    return uri


def _has_host(uri: str) -> bool:
    parts = urlsplit(uri)
    return bool(parts.hostname) and parts.port != 0


def connect() -> "MlflowClient":
    """Return a client of the store named by `MLFLOW_TRACKING_URI`, without mlflow's log lines.

    The first process that connects creates an SQLite store, under a lock and a temporary name, and renames it when it
    is whole: a process that is killed meanwhile leaves nothing that a later one could mistake for a store.

    Raises:
        ConfigError: mlflow does not support a store with this URI.
        StoreError: an SQLite file is damaged, or a database does not answer in time.
        KeyError: the variable is not set; see `use_store`.
    """
    uri = store_uri()
    client_of = _client_class()
    file = _sqlite_file(uri)
    if file is None:
        return _connected(partial(client_of, tracking_uri=uri), uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{file}.lock"), wait=True):
        if not file.exists() or file.stat().st_size == 0:
            _make(file, uri, client_of)
        try:
            _require_tables(file)
            return client_of(tracking_uri=uri)
        except Exception as error:
            raise StoreError(
                f"{file}: cannot be used as MLflow's store ({one_line(error)}); move it away to have a new one made"
            ) from error


def _client_class() -> "Callable[..., MlflowClient]":
    for name, value in (_CLIENT_SETTINGS | _SHORT).items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow.tracking import MlflowClient

    # mlflow configures its own logger on import.
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client_of: Callable[..., MlflowClient] = MlflowClient
    return client_of


def _connected(make: "Callable[[], MlflowClient]", uri: str) -> "MlflowClient":
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    try:
        return call_with_timeout(make, _CONNECT_SECONDS)  # mlflow retries an unreachable database for hours
    except UnsupportedModelRegistryStoreURIException as error:
        raise ConfigError(f"{URI_VARIABLE} {masked(uri)!r}: mlflow knows no store of this kind") from error


def _sqlite_file(uri: str) -> Path | None:
    from sqlalchemy.engine import make_url

    name = make_url(uri).database if uri.startswith("sqlite:") else None
    return None if name is None else Path(name)


def _require_tables(file: Path) -> None:
    """Raise sqlite3's error if a file is not an MLflow database: mlflow itself would retry it for hours."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
        database.execute("SELECT version_num FROM alembic_version").fetchone()


def _make(file: Path, uri: str, client_of: "Callable[..., MlflowClient]") -> None:
    """Create an SQLite store with all its tables; the caller holds the lock."""
    fresh = file.with_name(f"{file.name}.new")
    for left in (fresh, Path(f"{fresh}-journal")):  # by a process that was killed
        left.unlink(missing_ok=True)
    try:
        client_of(tracking_uri=f"{uri.partition('?')[0]}.new")
    except Exception:
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(file)


def call_with_timeout(call: Callable[[], T], seconds: float) -> T:
    """Return the result of a call if it takes at most `seconds`; a longer call continues in its thread.

    Raises:
        StoreError: it took longer. Exception: raised by the call.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="mlflow-store", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():  # the call's own error
            raise
        raise StoreError(f"no answer within {seconds:.0f} s") from None


@contextmanager
def longer_timeouts() -> Iterator[None]:
    """Wait longer for the store, and retry: for requests made by hand, or large ones."""
    before = {name: os.environ.get(name) for name in _PATIENT}
    os.environ.update(_PATIENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
