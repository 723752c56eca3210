"""A cycle that is killed at any moment and started again ends with the same version as without the kill."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sidestack.infra.manifest import read_manifest
from sidestack.infra.mlflow_store import URI_VARIABLE, connect
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.retrain.ledger import Ledger
from tests.components.golden import ROOT
from tests.pipelines.retrain.nights import config_in

pytestmark = pytest.mark.whole
NIGHTS = 2
LIMIT_S = 300


def start(folder: Path) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name != URI_VARIABLE}
    command = [sys.executable, "-m", "tests.pipelines.retrain.driver", str(folder), str(NIGHTS)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def children_of(pid: int) -> list[int]:
    """Return the ids of all descendants of a process."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, new = list[int](), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a driver and all its descendants at once, as a failing machine does."""
    for pid in [*children_of(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def result(folder: Path) -> dict[str, object]:
    """Return the result of the nights: champions, plans, gates, and the digests of weights and predictions."""
    config = config_in(folder)
    run, ledger = run_dir(config.run), Ledger(run_dir(config.run))
    found: dict[str, object] = {"champions": ledger.champions, "under way": ledger.under_way}
    for cycle in ledger.cycles:
        assert cycle.outcome is not None and cycle.outcome.candidate is not None
        candidate = cycle.outcome.candidate
        files = read_manifest(run / candidate.ranker).files
        kept = {name: entry.sha256 for name, entry in files.items() if name.startswith(("model/", "predictions/"))}
        plan = cycle.plan.model_dump(exclude={"at"})
        found[f"cycle {cycle.plan.number}"] = (kept, plan, cycle.outcome.gates, candidate.learned_to)
    return found


def run_to_end(folder: Path) -> dict[str, object]:
    """Run a driver to its end, and return the result of its nights."""
    assert start(folder).wait(timeout=LIMIT_S) == 0
    return result(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], float]]:
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    yield run_to_end(folder), time.monotonic() - began
    shutil.rmtree(folder)


def killed_and_run_again(folder: Path, seconds: float, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill a driver `kills` times at random moments, then run it to its end."""
    for _ in range(kills):
        process = start(folder)
        try:
            process.wait(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            kill(process)
    return run_to_end(folder)


def test_three_kills_change_nothing(undisturbed: tuple[dict[str, object], float], tmp_path: Path) -> None:
    (expected, seconds), seed = undisturbed, time.time_ns()
    found = killed_and_run_again(tmp_path, seconds, 3, random.Random(seed))
    assert found == expected, f"seed {seed}"
    require_store(tmp_path)


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(20))
def test_twenty_kills_change_nothing(
    undisturbed: tuple[dict[str, object], float],
    tmp_path: Path,
    seed: int,
    record_property: Callable[[str, object], None],
) -> None:
    (expected, seconds), began = undisturbed, time.monotonic()
    record_property("fault", "SIGKILL to the driver of two retraining cycles and all that it started")
    found = killed_and_run_again(tmp_path, seconds, 1, random.Random(seed))
    record_property("measure", "seconds that a kill costs, the new start included")
    record_property("seconds", time.monotonic() - began - seconds)
    assert found == expected
    require_store(tmp_path)


def require_store(folder: Path) -> None:
    """Check that the store has each cycle's run and version once, and the champion's alias."""
    patch = pytest.MonkeyPatch()
    patch.setenv(URI_VARIABLE, f"sqlite:///{folder}/runs/mlflow.db")
    try:
        client = connect()
        (experiment,) = [one for one in client.search_experiments() if one.name == "nights"]
        runs = client.search_runs([experiment.experiment_id], "attributes.run_name LIKE 'cycle%'")
        assert sorted(run.data.tags["sidestack.cycle"] for run in runs) == ["1", "2"]
        assert {run.info.status for run in runs} == {"FINISHED"}
        versions = client.search_model_versions("name = 'sidestack-nights'")
        cycles = [version.tags["sidestack.cycle"] for version in versions]
        assert sorted(cycles) == ["1", "2"], "each candidate is registered once"
        champion = str(client.get_registered_model("sidestack-nights").aliases["champion"])
        assert client.get_model_version("sidestack-nights", champion).tags["sidestack.cycle"] == "2"
    finally:
        patch.undo()
