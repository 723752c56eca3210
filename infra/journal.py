"""A journal of a pipeline's MLflow run, kept in the run's folder until the store has all of it.

A driver records what happens (a stage is done, the run ends) and then sends what the store lacks. If the store does not
answer, the file stays, and the next driver or `python -m pipelines.track` sends it. A driver that is restarted after
its run was killed or failed opens the same file, and so continues the same parent run.
"""

import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sidestack.infra.config import Config, digest, parse
from sidestack.infra.errors import SidestackError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import is_committed
from sidestack.infra.mlflow_runs import end_parent, log_artifacts, open_parent, replay
from sidestack.infra.mlflow_store import StoreError
from sidestack.infra.remote.copies import refresh, remove_file
from sidestack.infra.tables import read_json

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FOLDER = "tracking"
"""The folder of a run that holds its journals."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class StageEntry(Config):
    """A committed stage. `is_reused`: it was committed before the pipeline ran. `is_sent`: it is in the store."""

    out: Path
    inputs: dict[str, Path] = {}
    is_reused: bool = False
    is_sent: bool = Field(default=False, alias="is_told")


class Entries(Config):
    """The content of a journal's file."""

    id: str
    experiment: str
    title: str
    """The MLflow run's name."""
    config: dict[str, Any]
    """Logged as params."""
    began: datetime
    run_id: str = ""
    """The parent run's id; empty: the store has no parent run yet."""
    stages: dict[str, StageEntry] = {}
    """By label."""
    status: Status | None = None
    """None: the pipeline is running, or its driver was killed."""
    ended: datetime | None = None
    artifacts: tuple[Path, ...] = ()
    is_sent: bool = Field(default=False, alias="is_told")
    """Whether the end of the run was sent to the store."""


class Journal:
    """One parent run's entries, in a file that is replaced atomically at every change."""

    def __init__(self, file: Path, entries: Entries) -> None:
        """Hold the entries of a file that exists or will be written; normally called by `begin` and `journals`."""
        self._file = file
        self._folder = file.parent.parent
        self._is_open = False
        self._changing, self._sending = threading.Lock(), threading.Lock()
        self.entries = entries

    @property
    def parent_run(self) -> str:
        """The parent run's id; empty: the store has no parent run yet."""
        return self.entries.run_id

    def reopen(self) -> None:
        """Resume a run that was killed or failed."""
        self._change(status=None, ended=None, artifacts=(), is_sent=False)

    def add(self, label: str, out: Path, inputs: Mapping[str, Path], *, is_reused: bool) -> None:
        """Record that a stage is committed; an existing entry of the same output is not changed."""
        known = self.entries.stages.get(label)
        if known is None or known.out != self._stored_path(out):
            places = {name: self._stored_path(path) for name, path in inputs.items()}
            self._put(label, StageEntry(out=self._stored_path(out), inputs=places, is_reused=is_reused))

    def close(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Record how the run ended, and the artifacts to attach to it."""
        self._change(status=status, ended=_now(), artifacts=tuple(map(self._stored_path, artifacts)), is_sent=False)

    def send(self, client: "MlflowClient", runs_dir: Path) -> None:
        """Send the store all entries that it lacks. A failure in between neither loses nor duplicates entries.

        Args:
            client: the store. runs_dir: where a local store keeps artifacts.

        Raises:
            StoreError: an earlier call still waits for the store. Exception: raised by the store's client.
        """
        if not self._sending.acquire(blocking=False):
            raise StoreError("an earlier request has had no answer yet")
        try:
            if not self.entries.is_sent:
                self._send(client, runs_dir)
        finally:
            self._sending.release()

    def _send(self, client: "MlflowClient", runs_dir: Path) -> None:
        if not self._is_open:
            self._open(client, runs_dir)
        for label, stage in self.entries.stages.items():
            out = self._folder / stage.out
            if not stage.is_sent and is_committed(out):  # a stage that was removed meanwhile is skipped
                inputs = {name: self._folder / path for name, path in stage.inputs.items()}
                replay(client, self.parent_run, out, inputs, is_reused=stage.is_reused)
                self._put(label, stage.model_copy(update={"is_sent": True}))
        if self.entries.status is not None:
            log_artifacts(client, self.parent_run, [self._folder / path for path in self.entries.artifacts])
            end_parent(client, self.parent_run, self.entries.status, self.entries.ended)
            self._change(is_sent=True)

    def _open(self, client: "MlflowClient", runs_dir: Path) -> None:
        """Find or create the parent run; if it is a new one, as in another store, no stage counts as sent to it."""
        one = self.entries
        run_id = open_parent(client, one.experiment, one.title, runs_dir, one.config, one.id, one.began)
        if run_id != one.run_id:
            unsent = {label: stage.model_copy(update={"is_sent": False}) for label, stage in one.stages.items()}
            self._change(run_id=run_id, stages=unsent)
        self._is_open = True

    def remove(self) -> None:
        """Remove the file."""
        remove_file(self._file)

    def write(self) -> None:
        """Write the entries to the file."""
        write_whole(self._file, (self.entries.model_dump_json(indent=1, by_alias=True) + "\n").encode())

    def _put(self, label: str, stage: StageEntry) -> None:
        with self._changing:
            self.entries = self.entries.model_copy(update={"stages": {**self.entries.stages, label: stage}})
            self.write()

    def _change(self, **changes: Any) -> None:
        with self._changing:
            self.entries = self.entries.model_copy(update=changes)
            self.write()

    def _stored_path(self, path: Path) -> Path:
        """Return a path as stored: relative to the run's folder, so that a run can be moved."""
        return path.relative_to(self._folder) if path.is_relative_to(self._folder) else path.absolute()


def begin(folder: Path, experiment: str, title: str, config: Mapping[str, Any]) -> Journal:
    """Return the journal of a new run, or that of an unfinished run with the same title and config, to resume it.

    Args:
        folder: the run's. experiment: MLflow's. title: the MLflow run's name.
        config: the whole resolved config, without secrets.
    """
    for journal in journals(folder):
        found = journal.entries
        if found.status != "FINISHED" and (found.title, digest(found.config)) == (title, digest(config)):
            journal.reopen()
            return journal
    number = uuid.uuid4().hex
    entries = Entries(id=number, experiment=experiment, title=title, config=dict(config), began=_now())
    journal = Journal(folder / FOLDER / f"{number}.json", entries)
    journal.write()
    return journal


def journals(folder: Path) -> list[Journal]:
    """Return a run's journals, the oldest first; a file that cannot be read is skipped.

    Args:
        folder: the run's.
    """
    found = []
    refresh(folder / FOLDER)
    for file in (folder / FOLDER).glob("*.json"):
        with suppress(SidestackError):
            found.append(Journal(file, parse(Entries, read_json(file), str(file))))
    return sorted(found, key=lambda journal: journal.entries.began)


def _now() -> datetime:
    return datetime.now(UTC)
