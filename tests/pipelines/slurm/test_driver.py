"""The driver on a real Slurm of two nodes, which `infra/deploy/slurm/up.sh` starts on this machine."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.components.golden import ROOT
from tests.pipelines.driver import PATIENCE_S, Run, wait_until
from tests.pipelines.slurm.nodes import call, kill_node, start_now, state_of


@pytest.fixture
def run(cluster: None, tmp_path: Path) -> Iterator[Run]:
    """Return a run whose ranker has a rank on each of two nodes; its jobs end with the test."""
    run = slurm_run(tmp_path)
    yield run
    run.end_all()


def slurm_run(folder: Path, **options: Any) -> Run:
    ranker = {"nodes": 2, "ranks": 1, "cpu": 1, "memory_mb": 2000}
    return Run(
        folder, scheduler="slurm", scheduler_options={"partition": "main", "time": "00:10:00", **options},
        launch={"ranker": ranker},
    )  # fmt: skip


def job_of(run: Run) -> str:
    """Return Slurm's number of the ranker's job."""
    found = re.search(r"slurm://sidestack/(\d+)", run.record.read_text())
    assert found
    return found[1]


def began(run: Run, driver: "subprocess.Popen[str]", ranks: int = 2) -> None:
    wait_until(lambda: len(run.ranks()) >= ranks, f"{ranks} ranks began", driver)


@pytest.mark.slow
def test_a_driver_killed_and_started_again_follows_its_job_on_two_nodes(run: Run) -> None:
    with run.driver() as first:
        began(run, first)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=PATIENCE_S)
    job = job_of(run)
    with run.driver() as second:
        told = [next(line for line in iter(second.stderr.readline, "") if "[ranker]" in line)]
        assert f"is under way as slurm://sidestack/{job}" in told[0]
        run.let_go()
        _, rest = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 0 and "[ranker] was let go" in rest, rest
    assert len(run.ranks()) == 2
    names = {file.name for file in (run.folder / "runs/fake/logs").iterdir()}
    assert {f"slurm-{job}.out", f"slurm-{job}-ranker-0.err", f"slurm-{job}-ranker-1.err"} <= names
    assert not list(ROOT.glob("slurm-*"))


@pytest.mark.slurm
def test_two_jobs_of_two_nodes_share_the_nodes(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    second = slurm_run(other)
    with run.driver() as one, second.driver() as another:
        began(run, one)
        began(second, another)
        run.let_go()
        _, told = one.communicate(timeout=PATIENCE_S)
        assert one.returncode == 0, told
        time.sleep(5)  # what the first left behind would fail by now
        second.let_go()
        _, told = another.communicate(timeout=PATIENCE_S)
        assert another.returncode == 0, told


@pytest.mark.slurm
def test_a_queue_that_fails_for_a_while_ends_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away, real = tmp_path / "away", shutil.which("squeue")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/squeue"
    fault = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    wrapper.write_text(f'#!/bin/sh\n[ -e {away} ] && {{ echo "{fault}" >&2; exit 1; }}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    with run.driver() as driver:
        began(run, driver)
        away.touch()
        wait_until(lambda: "does not answer" in driver.stderr.readline(), "the driver tells of it")
        time.sleep(5)
        away.unlink()
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0 and "[ranker] slurm answers again" in told, told


@pytest.mark.slurm
def test_a_job_that_somebody_cancelled_is_told_as_that(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        call("scancel", job_of(run))
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1
    assert "error: [ranker] was cancelled by somebody at the scheduler: state CANCELLED" in told, told


@pytest.mark.slurm
def test_sigterm_cancels_the_job_at_the_scheduler(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        driver.send_signal(signal.SIGTERM)
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 143 and "[ranker] cancelled" in told, told
    assert call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip() == "CANCELLED"


@pytest.mark.slurm
def test_a_rank_that_fails_on_the_second_node_is_told_with_its_traceback(run: Run) -> None:
    run.let_go()
    status, told = run.end("ranker.fail_rank=1")
    assert status == 1 and "RuntimeError: the deliberate bug" in told and "error: [ranker] failed: local rank" in told


@pytest.mark.slurm
def test_a_requeued_job_goes_on_and_so_does_its_log(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        call("scontrol", "requeue", job)
        start_now(job)
        began(run, driver, ranks=4)
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, told
    assert told.count("[ranker] hello from 2 ranks") == 2, told
    kept = "".join(file.read_text() for file in (run.folder / "runs/fake/logs").glob(f"slurm-{job}-ranker-*.err"))
    assert kept.count("hello from 2 ranks") == 2


@pytest.mark.slurm
def test_a_preempted_job_is_followed_until_it_runs_again(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wait", "--output=/dev/null", "--wrap=true")
        start_now(job)
        began(run, driver, ranks=4)
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, told


@pytest.mark.slurm
def test_a_job_whose_node_died_is_followed_until_it_runs_again(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        command = kill_node("n2")
        wait_until(lambda: state_of(job) != "RUNNING", "Slurm finds that the node is down", driver)
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start_now(job)
        began(run, driver, ranks=4)
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, told


@pytest.mark.slurm
def test_a_time_limit_is_told_as_that(cluster: None, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, time="1")
    try:
        status, told = run.end()
    finally:
        run.end_all()
    assert status == 1 and "error: [ranker] reached the scheduler's time limit" in told, told


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.scheduler_options.partition=nope", "invalid partition specified: nope"),
        ("run.scheduler_options.nodelist=n7", "Invalid node name specified"),
        ("run.launch.ranker.nodes=7", "can never start: PartitionConfig: the partition has"),
    ],
)
def test_what_slurm_refuses_is_told_in_one_line(run: Run, override: str, said: str) -> None:
    run.let_go()
    status, told = run.end(override)
    assert status == 1 and said in told.splitlines()[-1], told
    assert "Traceback" not in told
