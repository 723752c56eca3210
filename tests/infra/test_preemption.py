"""A job that is preempted by a signal stops all ranks at the same step, leaves a mark, and resumes from that step."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sidestack.infra.errors import PreemptedError
from sidestack.infra.manifest import verify
from sidestack.infra.preemption import EXIT_STATUS, Mark, read_mark, remove_mark, write_mark
from tests.infra.jobs import LIMIT_S, job, wait_for

STAGE = "tests.infra.stepping_stage"


def settings(out: Path, **changes: object) -> list[str]:
    sets = [f"encoder.{name}={value}" for name, value in changes.items()]
    return ["--out", str(out), *(word for one in sets for word in ("--set", one))]


def has_begun(out: Path) -> bool:
    """Return whether the stage has saved a checkpoint."""
    return any(out.with_name(f"{out.name}.checkpoint").glob("step-*"))


def names_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.suffix != ".log")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.whole)])
def test_signal_to_the_job_stops_all_ranks_at_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    work = {"steps": 100, "seconds": 0.05, "checkpoint_every": 7}
    with job(STAGE, settings(out, **work), log) as process:
        wait_for(lambda: has_begun(out), process, log)
        process.send_signal(number)
        assert process.wait(LIMIT_S) == 1, log.read_text()  # torchrun's exit status
    mark = read_mark(out)
    assert mark is not None, log.read_text()
    assert (mark.signal, mark.ranks) == (number.name, 2)
    assert mark.seconds is not None and mark.seconds < 20
    assert str(mark) == f"preempted at step {mark.step}; start again to resume"
    assert (out.with_name("out.checkpoint") / f"step-{mark.step:012d}").is_dir()
    assert names_beside(out) == ["out.checkpoint", "out.preempted.json"]
    with job(STAGE, settings(out, **work), log) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert verify(out).facts["resumed_from"] == mark.step
    assert names_beside(out) == ["out"]
    with job(STAGE, settings(tmp_path / "whole", **work), log) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert (out / "sum.txt").read_text() == (tmp_path / "whole/sum.txt").read_text()


def test_stage_without_torchrun_exits_with_the_preemption_status(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    command = [sys.executable, "-m", STAGE, *settings(out, steps=2000, seconds=0.05)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_for(lambda: has_begun(out), process, log)
        process.terminate()
        assert process.wait(LIMIT_S) == EXIT_STATUS, log.read_text()
    finally:
        process.kill()
    mark = read_mark(out)
    assert f"preempted at step {mark.step} (SIGTERM asked it to stop); start it again to resume" in log.read_text()


def test_rank_in_long_work_exits_after_the_stop_timeout(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    work = {"fault": "work", "fault_step": 6, "fault_seconds": 2 * LIMIT_S}
    limits = {"SIDESTACK_TIMEOUT_STOP_S": "1", "SIDESTACK_TIMEOUT_WARNING_S": "1"}
    heartbeat = out.with_name("out.heartbeats") / "rank-00001.json"
    with job(STAGE, settings(out, **work), log, environment=limits) as process:
        wait_for(lambda: heartbeat.exists() and "step 6" in heartbeat.read_text(), process, log)
        process.terminate()
        assert process.wait(LIMIT_S) == 1
    mark = read_mark(out)
    assert mark is not None and mark.step is None, log.read_text()
    assert str(mark) == "preempted before a step was saved; start again to resume"
    assert has_begun(out)


def test_killed_rank_leaves_no_mark(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    with job(STAGE, settings(out, fault="die"), log) as process:
        assert process.wait(LIMIT_S) == 1
    assert read_mark(out) is None


def test_mark_is_read_as_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert read_mark(out) is None
    write_mark(out, PreemptedError("SIGTERM", 12), 4, 1.5)
    mark = read_mark(out)
    assert mark == Mark(step=12, signal="SIGTERM", ranks=4, time=mark.time, seconds=1.5)
    assert os.listdir(tmp_path) == ["out.preempted.json"]
    remove_mark(out)
    assert read_mark(out) is None
    assert EXIT_STATUS == 143
