"""What a pipeline's MLflow run is to show, kept in the run's folder until the store has it.

A driver writes down what happens (a stage is done, the run ends) and then sends what the store lacks. Where the store
does not answer the file stays, and the next driver or `python -m pipelines.track` sends it. A driver that is started
again after its run was killed or failed opens the same file, and so the same parent run.
"""

import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    """A committed stage. `is_reused`: it was committed before the pipeline ran. `is_told`: the store has it."""

    out: Path
    inputs: dict[str, Path] = {}
    is_reused: bool = False
    is_told: bool = False


class Entries(Config):
    """What a journal's file holds."""

    id: str
    experiment: str
    title: str
    """The MLflow run's name."""
    config: dict[str, Any]
    """Logged as params."""
    began: datetime
    run_id: str = ""
    """The parent run; empty: the store has none yet."""
    stages: dict[str, StageEntry] = {}
    """By label."""
    status: Status | None = None
    """None: the pipeline is under way, or its driver was killed."""
    ended: datetime | None = None
    artifacts: tuple[Path, ...] = ()
    is_told: bool = False
    """Whether the store knows how the run ended."""


class Journal:
    """One parent run's entries, in a file that is replaced whole at every change."""

    def __init__(self, file: Path, entries: Entries) -> None:
        """Hold the entries that a file has, or is to have; `begin` and `journals` are the usual ways."""
        self._file = file
        self._folder = file.parent.parent
        self._is_open = False
        self._changing, self._sending = threading.Lock(), threading.Lock()
        self.entries = entries

    @property
    def parent_run(self) -> str:
        """The parent run's id; empty: the store has none yet."""
        return self.entries.run_id

    def reopen(self) -> None:
        """Go on with a run that was killed or failed."""
        self._change(status=None, ended=None, artifacts=(), is_told=False)

    def add(self, label: str, out: Path, inputs: Mapping[str, Path], *, is_reused: bool) -> None:
        """Write down that a stage is committed; one that stands there already stays as it is."""
        known = self.entries.stages.get(label)
        if known is None or known.out != self._kept(out):
            places = {name: self._kept(path) for name, path in inputs.items()}
            self._put(label, StageEntry(out=self._kept(out), inputs=places, is_reused=is_reused))

    def close(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Write down how the run ended, and what is attached to it."""
        self._change(status=status, ended=_now(), artifacts=tuple(map(self._kept, artifacts)), is_told=False)

    def send(self, client: "MlflowClient", runs_dir: Path) -> None:
        """Tell the store all that it lacks. A failure in between loses nothing and doubles nothing.

        Args:
            client: the store. runs_dir: where a local store keeps artifacts.

        Raises:
            StoreError: an earlier call still waits for the store. Exception: the store's own.
        """
        if not self._sending.acquire(blocking=False):
            raise StoreError("an earlier request has had no answer yet")
        try:
            if not self.entries.is_told:
                self._send(client, runs_dir)
        finally:
            self._sending.release()

    def _send(self, client: "MlflowClient", runs_dir: Path) -> None:
        if not self._is_open:
            self._open(client, runs_dir)
        for label, stage in self.entries.stages.items():
            out = self._folder / stage.out
            if not stage.is_told and is_committed(out):  # what was removed meanwhile has nothing to tell
                inputs = {name: self._folder / path for name, path in stage.inputs.items()}
                replay(client, self.parent_run, out, inputs, is_reused=stage.is_reused)
                self._put(label, stage.model_copy(update={"is_told": True}))
        if self.entries.status is not None:
            log_artifacts(client, self.parent_run, [self._folder / path for path in self.entries.artifacts])
            end_parent(client, self.parent_run, self.entries.status, self.entries.ended)
            self._change(is_told=True)

    def _open(self, client: "MlflowClient", runs_dir: Path) -> None:
        """Find or make the parent run; where it is another than before, as in another store, that has no stage yet."""
        one = self.entries
        run_id = open_parent(client, one.experiment, one.title, runs_dir, one.config, one.id, one.began)
        if run_id != one.run_id:
            untold = {label: stage.model_copy(update={"is_told": False}) for label, stage in one.stages.items()}
            self._change(run_id=run_id, stages=untold)
        self._is_open = True

    def remove(self) -> None:
        """Remove the file."""
        remove_file(self._file)

    def write(self) -> None:
        """Write the entries to the file."""
        write_whole(self._file, (self.entries.model_dump_json(indent=1) + "\n").encode())

    def _put(self, label: str, stage: StageEntry) -> None:
        with self._changing:
            self.entries = self.entries.model_copy(update={"stages": {**self.entries.stages, label: stage}})
            self.write()

    def _change(self, **changes: Any) -> None:
        with self._changing:
            self.entries = self.entries.model_copy(update=changes)
            self.write()

    def _kept(self, path: Path) -> Path:
        """Return a path as the file has it: from the run's folder, so that a run can be moved."""
        return path.relative_to(self._folder) if path.is_relative_to(self._folder) else path.absolute()


def begin(folder: Path, experiment: str, title: str, config: Mapping[str, Any]) -> Journal:
    """Return the journal of a run that begins, or goes on: of one with the same title and config that did not finish.

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
    """Return a run's journals, the oldest first; a file that cannot be read is passed over.

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
