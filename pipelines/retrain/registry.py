"""MLflow as a view of retraining: a run per cycle, a version per candidate, and the aliases that serving follows.

The ledger is the record. What could not be sent, because the store did not answer, is sent by a later call.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sidestack.infra.config import Config, parse
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import fetched, read_manifest
from sidestack.infra.masking import one_line
from sidestack.infra.mlflow_runs import end_parent, metric_name, open_parent, replay
from sidestack.infra.mlflow_store import connect, use_store
from sidestack.infra.registration import register
from sidestack.infra.remote.copies import refresh
from sidestack.infra.tables import read_json
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.retrain.ledger import Cycle, Ledger

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

T = TypeVar("T")

CYCLE_TAG = "sidestack.cycle"
RUN_TAG = "sidestack.retraining"
"""The tag that distinguishes a run's own cycles and versions from those of another run of the same name."""
HISTORY_TAG = "sidestack.cycles"
CHAMPION_ALIAS, CHALLENGER_ALIAS = "champion", "challenger"
PUBLISHED_FILE = "published.json"
MODEL = "model"
"""The folder of an export that holds the MLflow model."""
_PAUSE_SECONDS = 60.0
"""Pause after a failed request to the store, so that a backfill of many cycles does not wait for it each time."""


class Published(Config):
    """Record of what was sent to the store."""

    id: str = ""
    """The run's id in the store (`RUN_TAG`)."""
    runs: dict[int, str] = {}
    """Cycle -> its MLflow run."""
    versions: dict[int, str] = {}
    """Cycle -> the registered version of its candidate."""
    champion: int | None = None
    """The cycle whose version has the alias."""


class Registry:
    """A run's cycles in the tracking store.

    Args of the constructor:
        run: the run's folder. experiment: its name. runs_dir: of a local store. model: the registered model.
    """

    def __init__(self, run: Path, experiment: str, runs_dir: Path, model: str) -> None:
        self._file = run / PUBLISHED_FILE
        self._run, self._experiment, self._runs_dir, self._model = run, experiment, runs_dir, model
        self._pause_ends = 0.0
        refresh(run / PUBLISHED_FILE)
        use_store(runs_dir)

    @property
    def published(self) -> Published:
        """What was sent to the store so far."""
        return parse(Published, read_json(self._file), str(self._file)) if self._file.exists() else Published()

    def foreign_change(self, ledger: Ledger) -> str:
        """Return how somebody else changed the champion's alias; empty if unchanged or the store does not answer."""
        return self._ask(lambda client: self._moved(client, ledger)) or ""

    def _moved(self, client: "MlflowClient", ledger: Ledger) -> str:
        found, expected = _alias(client, self._model), self._own_versions(ledger)
        if found in expected:
            return ""
        return (
            f"alias {CHAMPION_ALIAS!r} of {self._model} is version {found or 'of none'}, it was set to version"
            f" {expected[0] or 'of none'}: somebody moved it; retrain rollback --version CYCLE sets it"
        )

    def _own_versions(self, ledger: Ledger) -> list[str | None]:
        """Return the versions to which retraining itself may have set the alias.

        These are the recorded version and the champion's: a killed call may have moved the alias before recording it.
        """
        published = self.published
        cycles = [published.champion, *ledger.champions[-1:]]
        return [None if cycle is None else published.versions.get(cycle) for cycle in cycles]

    def publish(self, ledger: Ledger, config: Mapping[str, Any], force: bool = False) -> None:
        """Send the store all that it lacks: cycles' runs and metrics, candidates' versions, the aliases.

        Args:
            ledger: the record. config: the run's, for the parameters of cycles' runs.
            force: whether to set the champion's alias even if somebody else moved it.
        """

        def send(client: "MlflowClient") -> None:
            for cycle in ledger.cycles:
                if cycle.outcome is not None and cycle.plan.number not in self.published.runs:
                    self._send_cycle(client, cycle, config)
                if cycle.outcome is not None and cycle.outcome.candidate is not None:
                    self._register(client, cycle)
            self._move_alias(client, ledger, force)

        self._ask(send)

    def _ask(self, question: "Callable[[MlflowClient], T]") -> T | None:
        """Return the store's answer; None if it does not answer, or did not a short time ago: a later call retries."""
        if time.monotonic() < self._pause_ends:
            return None
        try:
            return question(connect())
        except Exception as error:
            self._pause_ends = time.monotonic() + _PAUSE_SECONDS
            log_line("tracking", f"{one_line(error)}; the store is updated later")
            return None

    def _id(self) -> str:
        if not self.published.id:
            self._save(id=uuid.uuid4().hex)
        return self.published.id

    def _send_cycle(self, client: "MlflowClient", cycle: Cycle, config: Mapping[str, Any]) -> None:
        plan, outcome = cycle.plan, cycle.outcome
        assert outcome is not None
        name = f"cycle {plan.number}" if plan.kind == "train" else f"cycle {plan.number}, roll-back to {plan.champion}"
        journal = f"{self._id()}-{plan.number}"  # identifies the run that a killed call began to send
        run_id = open_parent(client, self._experiment, name, self._runs_dir, config, journal)
        client.set_tag(run_id, CYCLE_TAG, str(plan.number))
        client.set_tag(run_id, "sidestack.promoted", str(outcome.promoted))
        for path in outcome.stages.values():
            replay(client, run_id, self._run / path, {})
        for target in (run_id, self._history(client)):
            _log_figures(client, target, cycle)
        end_parent(client, run_id, "FINISHED")
        self._save(runs={**self.published.runs, plan.number: run_id})

    def _history(self, client: "MlflowClient") -> str:
        """Return the run with the figures of all cycles, so that the store plots them over time."""
        experiment = client.get_experiment_by_name(self._experiment)
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{HISTORY_TAG}` = '{self._id()}'")
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(experiment.experiment_id, run_name="all cycles", tags={HISTORY_TAG: self._id()})
        client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)

    def _register(self, client: "MlflowClient", cycle: Cycle) -> None:
        number = cycle.plan.number
        if number in self.published.versions:
            return
        assert cycle.outcome is not None and cycle.outcome.candidate is not None
        candidate = cycle.outcome.candidate
        export = fetched(self._run / candidate.export)
        lineage = read_manifest(export).facts.get("lineage", {})
        own = {RUN_TAG: self._id(), CYCLE_TAG: str(number)}
        tags = {**own, **{f"sidestack.{name}": str(value) for name, value in lineage.items()}}
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in own.items())
        made = client.search_model_versions(f"name = '{self._model}' and {query}")
        if made:  # by a call that was killed before it could record it
            version = str(made[0].version)
            client.set_registered_model_alias(self._model, CHALLENGER_ALIAS, version)
        else:
            version = register(export / MODEL, self._model, CHALLENGER_ALIAS, tags, "retrain")
        self._save(versions={**self.published.versions, number: version})
        log_line("retrain", f"registered as {self._model} version {version}, alias {CHALLENGER_ALIAS}")

    def _move_alias(self, client: "MlflowClient", ledger: Ledger, force: bool) -> None:
        champion = ledger.champions[-1] if ledger.champions else None
        published = self.published
        if champion is None or (champion == published.champion and not force):
            return
        version = published.versions[champion]
        if not force and _alias(client, self._model) not in self._own_versions(ledger):
            log_line("retrain", f"alias {CHAMPION_ALIAS!r} was moved by somebody else, and stays where it is")
            return
        client.set_registered_model_alias(self._model, CHAMPION_ALIAS, version)
        self._save(champion=champion)
        log_line("retrain", f"models:/{self._model}@{CHAMPION_ALIAS} is version {version}, of cycle {champion}")

    def _save(self, **changes: Any) -> None:
        published = self.published.model_copy(update=changes)
        write_whole(self._file, (published.model_dump_json(indent=1) + "\n").encode())


def _log_figures(client: "MlflowClient", run_id: str, cycle: Cycle) -> None:
    """Log a cycle's figures, and whether it was promoted, at the step of its number."""
    from mlflow.entities import Metric

    assert cycle.outcome is not None
    at = int(cycle.outcome.at.timestamp() * 1000)
    figures = {**cycle.outcome.figures, "promoted": float(cycle.outcome.promoted)}
    metrics = [Metric(metric_name(name), value, at, cycle.plan.number) for name, value in figures.items()]
    client.log_batch(run_id, metrics=metrics)


def _alias(client: "MlflowClient", model: str) -> str | None:
    """Return the version that has the champion's alias."""
    if not client.search_registered_models(f"name = '{model}'"):
        return None
    found = client.get_registered_model(model).aliases.get(CHAMPION_ALIAS)
    return None if found is None else str(found)
