"""A cycle that is killed at any moment ends, after another call, in the version it would have ended in."""

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

pytestmark = pytest.mark.slow
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
    """Return all processes that a process has started, and those that they have."""
    parents: dict[int, int] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, new = list[int](), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a driver and all that it started, at once, as a machine that goes down does."""
    for pid in [*children_of(process.pid), process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def result(folder: Path) -> dict[str, object]:
    """Return what the nights came to: champions, plans, gates, and every byte of weights and predictions."""
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


def whole(folder: Path) -> dict[str, object]:
    """Let a driver come to its end, and return what came of it."""
    assert start(folder).wait(timeout=LIMIT_S) == 0
    return result(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], float]]:
    folder, began = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    yield whole(folder), time.monotonic() - began
    shutil.rmtree(folder)


def killed_and_run_again(folder: Path, seconds: float, kills: int, rng: random.Random) -> dict[str, object]:
    """Kill a driver so many times at random moments, then let it end."""
    for _ in range(kills):
        process = start(folder)
        try:
            process.wait(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            kill(process)
    return whole(folder)


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
