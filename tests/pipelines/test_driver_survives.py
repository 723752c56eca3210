"""Drivers that are killed while a job of theirs runs on this machine, and started again."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.driver import PATIENCE_S, Run, wait_until


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Return a run; its processes end with the test."""
    run = Run(tmp_path)
    yield run
    run.end_all()


def left(run: Run, signum: signal.Signals, *overrides: str, ignored: bool = False) -> str:
    """Start the driver, and send it a signal while both ranks of the ranker work; return what it told."""
    with run.driver(*overrides, ignored=ignored) as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        driver.send_signal(signum)
        _, told = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), told
        return told


def test_a_driver_started_again_follows_the_job_of_one_that_was_killed(run: Run) -> None:
    left(run, signal.SIGKILL)
    staging = Path(run.ranks()[0].split()[0])
    record = json.loads(run.record.read_text())
    assert (record["label"], record["out"]) == ("ranker", str(run.record).removesuffix(".job.json"))
    with run.driver() as second:
        lines = iter(second.stderr.readline, "")
        told = [next(line for line in lines if "[ranker]" in line)]
        assert "is under way as local_cwd://sidestack/ranker-" in told[0] and "following it" in told[0]
        assert staging.is_dir() and Path(record["out"] + ".logs").is_dir()
        run.let_go()
        told += list(lines)
        assert second.wait(PATIENCE_S) == 0, told
    assert len(run.ranks()) == 2, "another job was launched"
    assert any("[ranker] was let go" in line for line in told) and not any("starts" in line for line in told)
    assert not list(run.ranker.glob("*.job.json")) and not list(run.ranker.glob(".*.tmp"))


@pytest.mark.slow
def test_sighup_leaves_the_job_where_that_is_wished_and_says_how_to_go_on(run: Run) -> None:
    told = left(run, signal.SIGHUP, "run.on_signal=leave")
    assert "[ranker] left running as local_cwd://sidestack/ranker-" in told and "the same command" in told
    assert "stopped by SIGHUP" in told and len(run.processes()) >= 2
    run.let_go()
    status, told = run.end()
    assert status == 0 and len(run.ranks()) == 2, told


@pytest.mark.slow
def test_sighup_cancels_the_job_by_default(run: Run) -> None:
    told = left(run, signal.SIGHUP)
    assert "[ranker] cancelled" in told and "stopped by SIGHUP" in told
    assert run.processes() == [] and not list(run.ranker.glob("*.job.json"))


@pytest.mark.slow
def test_sighup_that_nohup_ignores_stays_ignored(run: Run) -> None:
    with run.driver(ignored=True) as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        driver.send_signal(signal.SIGHUP)
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, told


@pytest.mark.slow
def test_a_followed_job_that_fails_is_told_with_its_traceback_and_then_launched_again(run: Run) -> None:
    left(run, signal.SIGKILL)
    with run.driver() as second:
        wait_until(lambda: "under way" in second.stderr.readline(), "the second driver follows")
        os.kill(int(run.ranks()[1].split()[2]), signal.SIGKILL)
        _, told = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 1 and "Signal 9 (SIGKILL) received" in told, told
    assert run.processes() == []
    run.let_go()
    status, told = run.end()
    assert status == 0 and len(run.ranks()) == 4 and "[ranker] starts" in told, told


@pytest.mark.slow
def test_a_job_that_was_superseded_commits_nothing(run: Run) -> None:
    with run.driver() as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        record = run.record
        kept = json.loads(record.read_text())
        record.write_text(json.dumps({**kept, "token": "another's"}))
        run.let_go()
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1 and "no longer holds the lease of its output" in told, told
    assert not Path(kept["out"]).exists() and json.loads(record.read_text())["token"] == "another's"


@pytest.mark.slow
def test_torchrun_that_was_killed_is_named_and_its_ranks_are_ended(run: Run) -> None:
    with run.driver() as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        rank = int(run.ranks()[0].split()[2])
        torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(torchrun, signal.SIGKILL)
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1 and "torchrun of node 0 was ended by SIGKILL" in told, told
    assert run.processes() == []


@pytest.mark.slow
def test_a_machine_whose_name_nobody_knows_runs_one_node_and_names_itself_on_two(run: Run) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root, and a kernel that lets a process have a host's name of its own")
    with run.driver("run.launch.ranker.nodes=2", host="no-such-name-zz") as driver:
        _, told = driver.communicate(timeout=PATIENCE_S)
    assert "[prepare] done in" in told and driver.returncode == 1, told
    assert "error: [ranker] failed: rendezvous: host 'no-such-name-zz' (this node's own name) does not resolve" in told
