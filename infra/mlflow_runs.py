"""MLflow as the view of a pipeline: one parent run, with one child run per stage or arm.

A child is filled by the same code whether its stage runs now (`infra.tracking.Mirror`), or was
committed earlier and is shown under a new parent (`replay`). Only rank 0 and the driver use this module.
"""

import hashlib
import json
import math
import os
import posixpath
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sidestack.infra.logs import LOG
from sidestack.infra.manifest import MANIFEST, fetch_files, is_committed, read_manifest
from sidestack.infra.masking import masked
from sidestack.infra.mlflow_store import store_in, store_uri
from sidestack.infra.record import CONFIG_FILE, HISTORY_FILE, SUMMARY_FILE, numbers_of
from sidestack.infra.remote.urls import address

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput
    from mlflow.tracking import MlflowClient

HistoryRow = tuple[float, int, Mapping[str, float]]
"""One line of a history: Unix time in seconds, step, values by name."""

JOURNAL_TAG = "sidestack.journal"
"""The tag with a parent run's journal, by which a resumed pipeline finds its parent run; see `infra.journal`."""

# Limits of the tracking store for one request, and for one value.
_METRICS_A_BATCH = 1000
_PARAMS_A_BATCH = 100
_PARAM_LENGTH = 500
_DIGEST_LENGTH = 36
_NAME_LENGTH = 250
_NAME_DIGEST_LENGTH = 8


def open_parent(
    client: "MlflowClient",
    experiment: str,
    name: str,
    runs_dir: Path,
    config: Mapping[str, Any],
    journal: str = "",
    began: datetime | None = None,
) -> str:
    """Open a pipeline's run in an experiment, and end runs that a killed driver left open there.

    Args:
        client: the store.
        experiment: the experiment's name; reruns of a pipeline share it.
        name: the run's name.
        runs_dir: where a local store keeps artifacts, in `mlartifacts/`; a server has its own place.
        config: the whole resolved config, logged as params.
        journal: value of `JOURNAL_TAG`; a run with this value is reopened. Empty: a new run.
        began: when the run began, if earlier than now.

    Returns:
        the run id, passed to the stages as `--parent-run`.
    """
    experiment_id = experiment_in(client, experiment, runs_dir)
    tags = {"sidestack.host": socket.gethostname(), "sidestack.process": _process(os.getpid())}
    if journal:
        tags[JOURNAL_TAG] = journal
    found = _search(client, experiment_id, f"tags.`{JOURNAL_TAG}` = '{journal}'") if journal else []
    for twin in found[1:]:  # from a request that the store executed though its answer was lost
        client.delete_run(twin.info.run_id)
    if found:
        run_id: str = found[0].info.run_id
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        client.update_run(run_id, status="RUNNING")
    else:
        start_ms = None if began is None else _milliseconds(began)
        run_id = client.create_run(experiment_id, run_name=name, tags=tags, start_time=start_ms).info.run_id
    _sweep(client, experiment_id)
    _log_params(client, run_id, config)
    return run_id


def _milliseconds(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def experiment_in(client: "MlflowClient", name: str, folder: Path) -> str:
    """Return the id of the experiment with a name; create it if there is none.

    A local store keeps its artifacts in `folder`, a server in its own place. An experiment keeps the location that it
    was created with. After a folder was moved or copied with its store, the experiment is renamed after that location,
    and a new one is created, so that nothing is written to the old location.
    """
    uri = store_uri()
    place = (folder.resolve() / "mlartifacts" / name).as_uri() if uri.startswith("sqlite:") else None
    found = client.get_experiment_by_name(name)
    if found is not None and uri == store_in(folder) and found.artifact_location != place:
        former = f"{name} (artifacts at {found.artifact_location})"
        client.rename_experiment(found.experiment_id, former)
        LOG.warning(f"tracking: {folder} was moved; its earlier MLflow runs are in experiment {former!r}")
        found = None
    if found is not None:
        if found.lifecycle_stage == "deleted":  # in the UI; the store keeps its name, so that no new one can have it
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    return str(client.create_experiment(name, artifact_location=place))


def _sweep(client: "MlflowClient", experiment: str) -> None:
    """End runs that are still RUNNING because their driver, on this host, was killed."""
    for run in _running(client, experiment, f"tags.`sidestack.host` = '{socket.gethostname()}'"):
        recorded = run.data.tags.get("sidestack.process", "")
        pid = int(recorded.partition(":")[0] or 0)
        if _process(pid) != recorded:
            end_parent(client, run.info.run_id, "KILLED")


def _process(pid: int) -> str:
    """Return a process's id and start time, which no later process with the same id has; empty if it has ended."""
    try:
        # Field 22 of stat is the start time; the second field, in brackets, may contain spaces.
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{pid}:{started}"


def _running(client: "MlflowClient", experiment: str, condition: str) -> Sequence[Any]:
    return _search(client, experiment, f"attributes.status = 'RUNNING' and {condition}")


def _search(client: "MlflowClient", experiment: str, query: str) -> list[Any]:
    return list(client.search_runs([experiment], filter_string=query))


def end_parent(client: "MlflowClient", run_id: str, status: str, ended: datetime | None = None) -> None:
    """End a pipeline's run with MLflow's `FINISHED`, `FAILED` or `KILLED`, now or at the earlier time `ended`.

    Children that are still RUNNING have lost their process and are ended as KILLED.
    """
    experiment = client.get_run(run_id).info.experiment_id
    for child in _running(client, experiment, f"tags.`mlflow.parentRunId` = '{run_id}'"):
        client.set_terminated(child.info.run_id, "KILLED")
    client.set_terminated(run_id, status, None if ended is None else _milliseconds(ended))


def log_artifacts(client: "MlflowClient", run_id: str, files: Iterable[Path]) -> None:
    """Attach files and whole directories to a run, skipping those that do not exist."""
    for file in files:
        if file.exists():
            client.log_artifact(run_id, str(file))


class ChildRun:
    """The run of one stage or arm under a pipeline's run."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        """Write to an existing run; `start` creates one."""
        self._client = client
        self.run_id = run_id

    @classmethod
    def start(
        cls,
        client: "MlflowClient",
        parent_run: str,
        stage: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Path],
        key: str,
        out: Path,
        *,
        is_reused: bool = False,
    ) -> "ChildRun":
        """Create the run with its tags, params and datasets.

        A run of the same work under this parent that was killed, or was not sent to its end, is removed: the new run
        contains all that it did.

        Args:
            client: the store.
            parent_run: the pipeline's run id.
            stage: the stage's name. The run has the name of its directory if that begins with the stage's name, such as
                `encoder-text_sid`; otherwise a ranker's run is named `ranker-<arm>`.
            config: the resolved section, flattened into params.
            inputs: committed directories by name, logged as datasets with their manifests' digests.
            key: the stage's key.
            out: the output's directory, or the temporary one beside it.
            is_reused: whether the output was committed before, so that the stage did not run now.
        """
        arm = config.get("arm")
        tags = {"mlflow.parentRunId": parent_run, "sidestack.stage": stage, "sidestack.key": key}
        tags["sidestack.label"] = out.parent.name
        if arm is not None:
            tags["sidestack.arm"] = str(arm)
        if is_reused:
            tags["sidestack.reused_from"] = str(out)
        experiment = client.get_run(parent_run).info.experiment_id
        name = stage if arm is None else f"{stage}-{arm}"
        if out.parent.name.startswith(f"{stage}-"):
            name = out.parent.name
        for child in _children(client, parent_run, key, out):
            if child.info.status not in ("FINISHED", "FAILED"):
                client.delete_run(child.info.run_id)
        run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        _log_params(client, run_id, config)
        client.log_inputs(run_id, _datasets(inputs))
        return cls(client, run_id)

    def log_history(self, rows: Sequence[HistoryRow]) -> None:
        """Log history rows as metrics, in batches."""
        self._log_metrics((name, value, at, step) for at, step, values in rows for name, value in values.items())

    def finish(self, status: str, out: Path) -> None:
        """Log the summary's numbers, attach the record and the manifest, and end the run."""
        summary = out / SUMMARY_FILE
        if summary.is_file():
            now = time.time()
            leaves = flatten(json.loads(summary.read_text(encoding="utf-8"))).items()
            self._log_metrics(
                (f"summary/{name}", float(value), now, 0)
                for name, value in leaves
                if isinstance(value, int | float) and not isinstance(value, bool)
            )
        files = [out / name for name in (MANIFEST, CONFIG_FILE, SUMMARY_FILE, HISTORY_FILE)]
        log_artifacts(self._client, self.run_id, files)
        self._client.set_terminated(self.run_id, status)

    def _log_metrics(self, points: Iterable[tuple[str, float, float, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(metric_name(name), value, int(at * 1000), step)
            for name, value, at, step in points
            if math.isfinite(value)
        ]
        for start in range(0, len(metrics), _METRICS_A_BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_A_BATCH])


def _children(client: "MlflowClient", parent_run: str, key: str, out: Path) -> list[Any]:
    """Return a parent's runs of one stage's work; none if the work has no key."""
    if not key:
        return []
    experiment = client.get_run(parent_run).info.experiment_id
    work = {"mlflow.parentRunId": parent_run, "sidestack.key": key, "sidestack.label": out.parent.name}
    return _search(client, experiment, " and ".join(f"tags.`{name}` = '{value}'" for name, value in work.items()))


def replay(
    client: "MlflowClient", parent_run: str, committed: Path, inputs: Mapping[str, Path], *, is_reused: bool = True
) -> None:
    """Show a committed stage under a parent, from its files alone; no-op if it is already shown there.

    Args:
        client: the store.
        parent_run: the pipeline's run id.
        committed: the stage's output.
        inputs: the stage's input directories by name.
        is_reused: whether it was committed before the pipeline ran.

    Raises:
        CommitError: `committed` is not a committed directory.
    """
    manifest = read_manifest(committed)
    fetch_files(committed, CONFIG_FILE, HISTORY_FILE, SUMMARY_FILE)
    children = _children(client, parent_run, manifest.key, committed)
    if any(child.info.status == "FINISHED" for child in children):
        return
    config = _read_config(committed / CONFIG_FILE)
    child = ChildRun.start(
        client, parent_run, manifest.stage, config, inputs, manifest.key, committed, is_reused=is_reused
    )
    child.log_history(list(_read_history(committed / HISTORY_FILE)))
    child.finish("FINISHED", committed)


def _read_config(file: Path) -> dict[str, Any]:
    """Return the single section of a stage's `config.yaml`."""
    sections = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    (section,) = sections.values() if sections else ({},)
    return dict(section)


def _read_history(file: Path) -> Iterator[HistoryRow]:
    if not file.is_file():
        return
    at = file.stat().st_mtime
    for line in file.read_text(encoding="utf-8").splitlines():
        yield at, *numbers_of(line)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys; lists stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _log_params(client: "MlflowClient", run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(metric_name(key), _shortened(masked(str(value)))) for key, value in flatten(config).items()]
    for start in range(0, len(params), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])


def _shortened(text: str) -> str:
    return text if len(text) <= _PARAM_LENGTH else text[: _PARAM_LENGTH - 1] + "…"


def metric_name(name: str) -> str:
    """Return a metric's or param's name as the store accepts it; a changed name gets a digest of the original.

    The store accepts letters, digits and `_-. :/`, at most 250 of them, and only normalized paths, unlike `a//b`. The
    digest keeps names distinct that would be equal after the change.
    """
    taken = re.sub(r"[^\w\-. :/]", "_", name)
    is_one_path = posixpath.normpath(taken) == taken and taken != "." and not taken.startswith(("/", ".."))
    if taken == name and is_one_path and len(name) <= _NAME_LENGTH:
        return name
    if not is_one_path:
        taken = taken.replace("/", "_").replace(".", "_")
    digest = hashlib.sha256(name.encode()).hexdigest()[:_NAME_DIGEST_LENGTH]
    return f"{taken[: _NAME_LENGTH - _NAME_DIGEST_LENGTH - 1]}_{digest}"


def _datasets(inputs: Mapping[str, Path]) -> "list[DatasetInput]":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    logged = []
    for name, path in inputs.items():
        if not is_committed(path):
            continue
        digest = read_manifest(path).digest
        source = json.dumps({"path": address(path)})
        # The store cuts digests at 36 characters, so the full digest goes into a tag.
        dataset = Dataset(name, digest[:_DIGEST_LENGTH], "local", source)
        tags = [InputTag("mlflow.data.context", name), InputTag("sidestack.digest", digest)]
        logged.append(DatasetInput(dataset, tags))
    return logged
