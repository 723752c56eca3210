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
    """Return the Slurm id of the ranker's job."""
    found = re.search(r"slurm://sidestack/(\d+)", run.record.read_text())
    assert found
    return found[1]


def began(run: Run, driver: "subprocess.Popen[str]", ranks: int = 2) -> None:
    wait_until(lambda: len(run.ranks()) >= ranks, f"{ranks} ranks began", driver)


@pytest.mark.slow
def test_restarted_driver_follows_its_job_on_two_nodes(run: Run) -> None:
    with run.driver() as first:
        began(run, first)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=PATIENCE_S)
    job = job_of(run)
    with run.driver() as second:
        line = next(line for line in iter(second.stderr.readline, "") if "[ranker]" in line)
        assert f"is under way as slurm://sidestack/{job}" in line
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
        _, err = one.communicate(timeout=PATIENCE_S)
        assert one.returncode == 0, err
        time.sleep(5)  # leftovers of the first job would make the second fail by now
        second.let_go()
        _, err = another.communicate(timeout=PATIENCE_S)
        assert another.returncode == 0, err


@pytest.mark.slurm
def test_temporary_failure_of_squeue_does_not_end_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        wait_until(lambda: "does not answer" in driver.stderr.readline(), "the driver reports the failure")
        time.sleep(5)
        away.unlink()
        run.let_go()
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0 and "[ranker] slurm answers again" in err, err


@pytest.mark.slurm
def test_job_cancelled_at_the_scheduler_is_reported_as_cancelled(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        call("scancel", job_of(run))
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1
    assert "error: [ranker] was cancelled by somebody at the scheduler: state CANCELLED" in err, err


@pytest.mark.slurm
def test_sigterm_cancels_the_job_at_the_scheduler(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        driver.send_signal(signal.SIGTERM)
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 143 and "[ranker] cancelled" in err, err
    assert call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip() == "CANCELLED"


@pytest.mark.slurm
def test_rank_failing_on_the_second_node_is_reported_with_its_traceback(run: Run) -> None:
    run.let_go()
    status, err = run.end("ranker.fail_rank=1")
    assert status == 1 and "RuntimeError: the deliberate bug" in err and "error: [ranker] failed: local rank" in err


@pytest.mark.slurm
def test_requeued_job_is_followed_and_appends_to_its_log(run: Run) -> None:
    with run.driver() as driver:
        began(run, driver)
        job = job_of(run)
        call("scontrol", "requeue", job)
        start_now(job)
        began(run, driver, ranks=4)
        run.let_go()
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, err
    assert err.count("[ranker] hello from 2 ranks") == 2, err
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
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, err


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
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, err


@pytest.mark.slurm
def test_exceeded_time_limit_is_reported(cluster: None, tmp_path: Path) -> None:
    run = slurm_run(tmp_path, time="1")
    try:
        status, err = run.end()
    finally:
        run.end_all()
    assert status == 1 and "error: [ranker] reached the scheduler's time limit" in err, err


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.scheduler_options.partition=nope", "invalid partition specified: nope"),
        ("run.scheduler_options.nodelist=n7", "Invalid node name specified"),
        ("run.launch.ranker.nodes=7", "can never start: PartitionConfig: the partition has"),
    ],
)
def test_job_refused_by_slurm_is_reported_in_one_line(run: Run, override: str, message: str) -> None:
    run.let_go()
    status, err = run.end(override)
    assert status == 1 and message in err.splitlines()[-1], err
    assert "Traceback" not in err
