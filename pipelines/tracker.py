"""A pipeline's MLflow run, sent by its driver: at once while the store answers, otherwise later."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidestack.infra.errors import ConfigError
from sidestack.infra.journal import Journal, Status, begin, journals
from sidestack.infra.masking import masked, one_line
from sidestack.infra.mlflow_store import call_with_timeout, connect, store_uri
from sidestack.pipelines.job_log import log_line

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_SEND_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 60.0
LATER = "python -m sidestack.pipelines.track"


class Tracker:
    """Writer of the run's journal, which it sends to the store.

    After a failure it waits for a minute, then for twice as long each time, and tries once more when the run ends: an
    unavailable store costs a driver some seconds in total.
    """

    def __init__(self, folder: Path, runs_dir: Path, title: str, config: Mapping[str, Any]) -> None:
        """Begin a run, or resume one with the same title and config that was killed or failed.

        Args:
            folder: the run's; its name is the experiment's. runs_dir: the folder of a local store.
            title: the MLflow run's name. config: logged as params, without secrets.

        Raises:
            ConfigError: `MLFLOW_TRACKING_URI` is not a store's address.
        """
        self._folder, self._runs_dir = folder, runs_dir
        self._client: MlflowClient | None = None
        self._pause, self._pause_ends = _FIRST_PAUSE_SECONDS, 0.0
        self._is_local = store_uri().startswith("sqlite:")
        self._journal = begin(folder, folder.name, title, config)
        self._try(self._send)

    @property
    def parent_run(self) -> str:
        """The parent run of the stages; empty while the store does not answer: stages then write files only."""
        return "" if time.monotonic() < self._pause_ends else self._journal.parent_run

    def add(self, label: str, out: Path, inputs: Mapping[str, Path], *, is_reused: bool) -> None:
        """Log a committed stage; see `Journal.add`."""
        self._journal.add(label, out, inputs, is_reused=is_reused)
        if time.monotonic() >= self._pause_ends:
            self._try(self._send)

    def close(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """End the run, and send the store what it lacks of this and earlier runs."""
        self._journal.close(status, artifacts)
        self._try(self._send)
        if self._journal.entries.is_sent:
            self._try(self._send_earlier)

    def _try(self, send: "Callable[[MlflowClient], None]") -> None:
        try:
            self._client = self._client or connect()
            send(self._client)
        except ConfigError:
            raise
        except Exception as error:
            if self._pause == _FIRST_PAUSE_SECONDS:
                why = f"{masked(store_uri())}: {one_line(error)}"
                log_line("tracking", f"{why}; the run continues, `{LATER}` updates the store later")
            self._pause_ends = time.monotonic() + self._pause
            self._pause *= 2

    def _send(self, client: "MlflowClient") -> None:
        if self._is_local:
            self._journal.send(client, self._runs_dir)
        else:
            call_with_timeout(lambda: self._journal.send(client, self._runs_dir), _SEND_SECONDS)
        if self._journal.entries.status == "FINISHED":
            self._journal.remove()

    def _send_earlier(self, client: "MlflowClient") -> None:
        for journal in journals(self._folder):
            if journal.entries.id != self._journal.entries.id:
                send_unsent(client, journal, self._runs_dir)
                journal.remove()  # from another config: never resumed


def send_unsent(client: "MlflowClient", journal: Journal, runs_dir: Path) -> None:
    """Send the store what it lacks of a run whose driver is gone; an unfinished run can still be resumed."""
    if journal.entries.status is None:
        journal.close("KILLED")
    journal.send(client, runs_dir)
    if journal.entries.status == "FINISHED":
        journal.remove()
