"""The watchdog: a rank that stops or hangs is named with its last activity; a rank that works is waited for."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestack.infra.distributed import Timeouts, World
from sidestack.infra.heartbeat import Beat, Heartbeats, PeerBeat, ProgressMeter
from sidestack.infra.manifest import verify
from sidestack.infra.rank_state import RankState
from sidestack.infra.watchdog import _Watchdog
from tests.infra.jobs import LIMIT_S, job, ranks_of, wait_for
from tests.infra.test_preemption import STAGE, has_begun, names_beside, settings

QUICK = {"SIDESTACK_TIMEOUT_WARNING_S": "1", "SIDESTACK_TIMEOUT_COLLECTIVE_S": "4"}
WAITED = r"rank 0 has waited in 'step 12' for \d+ s; "


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stop", r"rank 1 has sent no heartbeat for \d+ s, its last from '.+'"),
        ("hang", r"rank 1 has made no progress in 'step 12' for \d+ s"),
    ],
)
def test_stalled_rank_is_named_and_the_stage_ends(tmp_path: Path, fault: str, words: str) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    with job(STAGE, settings(out, fault=fault), log, environment=QUICK) as process:
        # The rank that hangs may end first, because its own watchdog detects the hang too.
        error = rf"rank [01]: error: ({WAITED})?{words}; run.timeouts.collective_s=4 is over"
        wait_for(lambda: re.search(error, log.read_text()), process, log)
        assert re.search(rf"rank 0: warning: {WAITED}rank 1 ", log.read_text())
        for pid in ranks_of(process.pid):  # torchrun waits a minute for a stopped rank
            os.kill(pid, signal.SIGKILL)
        assert process.wait(LIMIT_S) == 1
    assert not out.exists()


def test_stalled_rank_0_is_named_by_the_others(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    with job(STAGE, settings(out, fault="stop", fault_rank=0), log, environment=QUICK) as process:
        words = r"rank 1: error: rank 1 has waited in 'step 12' for \d+ s; rank 0 has sent no heartbeat for \d+ s"
        wait_for(lambda: re.search(words, log.read_text()), process, log)


def test_work_that_takes_longer_than_the_timeout_continues(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    with job(STAGE, settings(out, fault="work", fault_seconds=9), log, environment=QUICK) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()
    assert verify(out).facts["resumed_from"] == 0
    assert re.search(r"rank 0 has waited in 'step 12' for \d+ s; rank 1 works in 'step 12' for \d+ s", log.read_text())
    assert names_beside(out) == ["out"]


def test_stage_continues_when_a_stopped_rank_resumes_in_time(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    limits = {**QUICK, "SIDESTACK_TIMEOUT_COLLECTIVE_S": str(LIMIT_S)}
    with job(STAGE, settings(out, steps=60, seconds=0.02), log, environment=limits) as process:
        wait_for(lambda: has_begun(out), process, log)
        stopped = ranks_of(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: "rank 1 has sent no heartbeat" in log.read_text(), process, log)
        os.kill(stopped, signal.SIGCONT)
        assert process.wait(LIMIT_S) == 0, log.read_text()


def test_heartbeat_has_a_ranks_activity_and_age(tmp_path: Path) -> None:
    out, state = tmp_path / "out", RankState()
    first, second = (Heartbeats(out, rank, 3) for rank in range(2))
    with state.at("reading events", is_committing=True), state.waiting():
        first.beat(state)
    file = out.with_name("out.heartbeats") / "rank-00000.json"
    before = file.stat().st_mtime - 40
    os.utime(file, (before, before))
    second.beat(RankState(signal="SIGTERM"))
    (heard,) = second.others()
    assert (heard.rank, heard.beat.doing, heard.beat.is_waiting) == (0, "reading events", True)
    assert heard.beat.is_committing and not heard.beat.has_signal
    assert 39 < heard.silent_s < 40 + LIMIT_S
    assert next(iter(first.others())).beat.has_signal
    size = file.stat().st_size
    first.beat(RankState(doing="x" * 5000))
    assert file.stat().st_size == size
    second.remove()
    assert list(first.others()) == []
    first.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("silent_s", "beat", "words"),
    [
        (20, {"is_waiting": True, "idle_s": 700}, None),  # it waits for this rank and missed some heartbeats
        (700, {"is_waiting": True, "idle_s": 700}, "rank 1 has sent no heartbeat for 700 s, its last from 'here'"),
        (1, {"is_waiting": True, "idle_s": 700}, None),
        (1, {"idle_s": 500}, None),
        (1, {"idle_s": 700}, "rank 1 has made no progress in 'here' for 700 s; run.timeouts.collective_s=600 is over"),
        (1, {"idle_s": 700, "is_committing": True}, None),
        (1, {"idle_s": 90_000, "is_committing": True}, "run.timeouts.commit_s=86400 is over"),
        (700, {"idle_s": 700, "is_committing": True}, "rank 1 has sent no heartbeat"),
    ],
)
def test_wait_ends_by_silence_or_idleness_beyond_the_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_s: float, beat: dict[str, Any], words: str | None
) -> None:
    values: dict[str, Any] = {
        "doing": "here",
        "since_s": 1e5,
        "is_waiting": False,
        "is_committing": False,
        "has_signal": False,
    }
    heard = PeerBeat(1, Beat(**{**values, **beat}), silent_s)
    monkeypatch.setattr("sidestack.infra.heartbeat.Heartbeats.others", lambda self: iter([heard]))
    ended: list[BaseException] = []
    monkeypatch.setattr("sidestack.infra.watchdog._Watchdog._end", lambda self, error, status: ended.append(error))
    world = World(0, 2, 0, torch.device("cpu"), "gloo")
    _Watchdog(world, tmp_path / "out", Timeouts(), record=ended.append)._watch(
        Beat(**{**values, "is_waiting": True, "idle_s": 1e5})
    )
    assert [words in str(error) for error in ended] == ([True] if words else [])


def test_stage_of_one_rank_has_no_heartbeat(tmp_path: Path) -> None:
    Heartbeats(tmp_path / "out", 0, 1).beat(RankState())
    assert list(tmp_path.iterdir()) == []


def test_steps_and_cpu_time_and_written_bytes_are_progress_and_sleep_is_not(tmp_path: Path) -> None:
    work, changes = ProgressMeter(), 0
    threading.Event().wait(0.3)
    assert work.idle_s(changes) >= 0.3
    assert work.idle_s(changes + 1) == 0
    (tmp_path / "file").write_bytes(b"x" * (1 << 20))
    assert work.idle_s(changes + 1) == 0
    until = time.process_time() + 0.05
    while time.process_time() < until:
        sum(range(1000))
    assert work.idle_s(changes + 1) == 0


def test_nested_activities_restore_the_outer_one() -> None:
    state = RankState(doing="training")
    with state.at("writing", is_committing=True):
        with state.at("hashing"):
            assert (state.doing, state.is_committing) == ("hashing", False)
        assert (state.doing, state.is_committing) == ("writing", True)
    assert (state.doing, state.is_committing) == ("training", False)
