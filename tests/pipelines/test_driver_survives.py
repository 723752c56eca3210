"""Drivers that are killed and restarted while their job runs on this machine."""

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


def interrupt(run: Run, signum: signal.Signals, *overrides: str, ignored: bool = False) -> str:
    """Start the driver, send it a signal while both ranks of the ranker work, and return its standard error."""
    with run.driver(*overrides, ignored=ignored) as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        driver.send_signal(signum)
        _, err = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), err
        return err


def test_restarted_driver_follows_the_job_of_the_killed_driver(run: Run) -> None:
    interrupt(run, signal.SIGKILL)
    staging = Path(run.ranks()[0].split()[0])
    record = json.loads(run.record.read_text())
    assert (record["label"], record["out"]) == ("ranker", str(run.record).removesuffix(".job.json"))
    with run.driver() as second:
        lines = iter(second.stderr.readline, "")
        output = [next(line for line in lines if "[ranker]" in line)]
        assert "is under way as local_cwd://sidestack/ranker-" in output[0] and "following it" in output[0]
        assert staging.is_dir() and Path(record["out"] + ".logs").is_dir()
        run.let_go()
        output += list(lines)
        assert second.wait(PATIENCE_S) == 0, output
    assert len(run.ranks()) == 2, "another job was launched"
    assert any("[ranker] was let go" in line for line in output) and not any("starts" in line for line in output)
    assert not list(run.ranker.glob("*.job.json")) and not list(run.ranker.glob(".*.tmp"))


@pytest.mark.whole
def test_sighup_leaves_the_job_running_and_explains_resuming_when_on_signal_is_leave(run: Run) -> None:
    err = interrupt(run, signal.SIGHUP, "run.on_signal=leave")
    assert "[ranker] left running as local_cwd://sidestack/ranker-" in err and "the same command" in err
    assert "stopped by SIGHUP" in err and len(run.processes()) >= 2
    run.let_go()
    status, err = run.end()
    assert status == 0 and len(run.ranks()) == 2, err


@pytest.mark.whole
def test_sighup_cancels_the_job_by_default(run: Run) -> None:
    err = interrupt(run, signal.SIGHUP)
    assert "[ranker] cancelled" in err and "stopped by SIGHUP" in err
    assert run.processes() == [] and not list(run.ranker.glob("*.job.json"))


@pytest.mark.whole
def test_sighup_stays_ignored_under_nohup(run: Run) -> None:
    with run.driver(ignored=True) as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        driver.send_signal(signal.SIGHUP)
        run.let_go()
        _, err = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 0, err


@pytest.mark.whole
def test_failure_of_a_followed_job_is_reported_and_the_next_run_launches_it_again(run: Run) -> None:
    interrupt(run, signal.SIGKILL)
    with run.driver() as second:
        wait_until(lambda: "under way" in second.stderr.readline(), "the second driver follows")
        os.kill(int(run.ranks()[1].split()[2]), signal.SIGKILL)
        _, err = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 1 and "Signal 9 (SIGKILL) received" in err, err
    assert run.processes() == []
    run.let_go()
    status, err = run.end()
    assert status == 0 and len(run.ranks()) == 4 and "[ranker] starts" in err, err


@pytest.mark.whole
def test_superseded_job_commits_nothing(run: Run) -> None:
    with run.driver() as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        record = run.record
        kept = json.loads(record.read_text())
        record.write_text(json.dumps({**kept, "token": "another's"}))
        run.let_go()
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1 and "no longer holds the lease of its output" in err, err
    assert not Path(kept["out"]).exists() and json.loads(record.read_text())["token"] == "another's"


@pytest.mark.whole
def test_killed_torchrun_is_named_and_its_ranks_are_ended(run: Run) -> None:
    with run.driver() as driver:
        wait_until(lambda: len(run.ranks()) == 2, "the ranker began", driver)
        rank = int(run.ranks()[0].split()[2])
        torchrun = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(torchrun, signal.SIGKILL)
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 1 and "torchrun of node 0 was ended by SIGKILL" in err, err
    assert run.processes() == []


@pytest.mark.whole
def test_unresolvable_host_name_works_on_one_node_and_is_named_on_two(run: Run) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root, and a kernel with UTS namespaces")
    with run.driver("run.launch.ranker.nodes=2", host="no-such-name-zz") as driver:
        _, err = driver.communicate(timeout=PATIENCE_S)
    assert "[prepare] done in" in err and driver.returncode == 1, err
    assert "error: [ranker] failed: rendezvous: host 'no-such-name-zz' (this node's own name) does not resolve" in err
