"""Why a job failed, from what its ranks, torchrun and the scheduler leave behind."""

import json
import os
from pathlib import Path

import pytest

from sidestack.infra.preemption import Mark
from sidestack.pipelines.failures import failure_message


def leave(logs: Path, node: str, rank: int, message: str, at: int, attempt: int = 0) -> None:
    directory = logs / node / f"attempt_{attempt}" / str(rank)
    directory.mkdir(parents=True)
    extra = {"py_callstack": f"Traceback of {message}", "timestamp": str(at)}
    report = {"message": {"message": message, "extraInfo": extra}}
    directory.joinpath("error.json").write_text(json.dumps(report))


def why(logs: Path) -> str:
    return failure_message("encoder", "FAILED", "", logs, ["bash: python: command not found"])


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    leave(tmp_path, "job_a", 0, "ValueError: late", 20)
    leave(tmp_path, "job_a", 1, "ValueError: early", 10)
    assert why(tmp_path).startswith("[encoder] failed: rank 1: Traceback of ValueError: early\n")


@pytest.mark.parametrize(
    "echo",
    [
        "StageError: stage encoder: rank 1 failed: column click",
        "RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234",
        "FileNotFoundError: [Errno 2] No such file or directory: '/runs/encoder/.abc.12345678.tmp/config.yaml'",
        "FileNotFoundError: [Errno 2] No such file or directory: '/runs/abc.checkpoint/.step-7.12ab.tmp/0.json'",
    ],
)
def test_an_echo_of_another_ranks_failure_is_not_the_cause(tmp_path: Path, echo: str) -> None:
    logs = tmp_path / "abc.logs"
    leave(logs, "job_a", 0, echo, 9)
    leave(logs, "job_a", 1, "DataError: column click", 10)
    assert "rank 1: DataError: column click\n" in why(logs)


def test_a_rank_that_was_killed_is_named_by_what_torchrun_saw(tmp_path: Path) -> None:
    leave(tmp_path, "job_a", 0, "RuntimeError: Connection reset by peer", 9)
    seen = ["  rank      : 1 (local_rank: 1)", "  traceback : Signal 9 (SIGKILL) received by PID 7", *["more"] * 20]
    assert "traceback : Signal 9 (SIGKILL) received by PID 7\n" in failure_message(
        "ranker", "FAILED", "", tmp_path, seen
    )


def test_a_missing_file_of_the_users_is_no_echo(tmp_path: Path) -> None:
    logs = tmp_path / "abc.logs"
    leave(logs, "job_a", 0, "FileNotFoundError: [Errno 2] No such file or directory: '/data/raw.csv'", 9)
    leave(logs, "job_a", 1, "KeyError: later", 10)
    assert "raw.csv" in why(logs)


def test_a_users_fault_needs_no_traceback_and_a_bug_does(tmp_path: Path) -> None:
    leave(tmp_path, "job_a", 0, "DataError: column click", 10)
    assert "Traceback" not in why(tmp_path)


def test_with_several_nodes_the_node_is_named(tmp_path: Path) -> None:
    leave(tmp_path, "job_a", 0, "KeyError: late", 20)
    leave(tmp_path, "job_b", 0, "KeyError: early", 10)
    assert "local rank 0 in job_b: Traceback of KeyError: early" in why(tmp_path)


def test_the_last_attempt_counts(tmp_path: Path) -> None:
    leave(tmp_path, "job_a", 0, "KeyError: mended by a restart", 10, attempt=0)
    leave(tmp_path, "job_a", 0, "KeyError: final", 20, attempt=1)
    assert "final" in why(tmp_path) and "mended" not in why(tmp_path)


def test_without_any_rank_the_last_lines_speak(tmp_path: Path) -> None:
    assert "bash: python: command not found" in why(tmp_path / "nowhere")


def test_of_failures_in_one_second_the_file_written_first_is_the_cause(tmp_path: Path) -> None:
    for rank, message in ((0, "KeyError: later"), (1, "KeyError: earlier")):
        leave(tmp_path, "job_a", rank, message, 10)
    written = {rank: tmp_path / f"job_a/attempt_0/{rank}/error.json" for rank in (0, 1)}
    os.utime(written[0], ns=(0, 2_000))
    os.utime(written[1], ns=(0, 1_000))
    assert "rank 1: Traceback of KeyError: earlier\n" in why(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"message": {"message": 1}}', '{"message": null}', "\xff"])
def test_an_error_file_that_a_full_disk_cut_hides_no_other_and_is_told_where_it_is_alone(
    tmp_path: Path, text: str
) -> None:
    logs = tmp_path / "abc.logs"
    leave(logs, "job_a", 0, "unread", 9)
    (logs / "job_a/attempt_0/0/error.json").write_bytes(text.encode("latin-1"))
    assert "rank 0: its error file cannot be read" in why(logs) and "is the disk full?" in why(logs)
    leave(logs, "job_a", 1, "CommitError: /runs/abc: no space left on the disk", 10)
    assert "failed: rank 1: CommitError: /runs/abc: no space left on the disk\n" in why(logs)


def test_a_checkpoint_that_cannot_be_written_is_told_as_that(tmp_path: Path) -> None:
    logs = tmp_path / "abc.logs"
    missing = "FileNotFoundError: [Errno 2] No such file or directory: '/r/abc.checkpoint/.step-9.aa.tmp/rank1.json'"
    leave(logs, "job_a", 1, missing, 9)
    leave(logs, "job_a", 0, "CommitError: /r/abc.checkpoint/step-9: no space left on the disk", 10)
    assert "failed: rank 0: CommitError: /r/abc.checkpoint/step-9: no space left on the disk\n" in why(logs)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("torch...RendezvousTimeoutError", "the job's nodes did not meet in time (run.rendezvous_s)"),
        ("torch...RendezvousConnectionError: The connection to", "a node could not reach the job's first node"),
    ],
)
def test_nodes_that_did_not_meet_are_told(tmp_path: Path, line: str, told: str) -> None:
    assert told in failure_message("ranker", "FAILED", "", tmp_path, ["Traceback", line])


def test_a_host_that_nobody_knows_is_the_reason_and_nothing_else(tmp_path: Path) -> None:
    line = "rendezvous: host 'n9' does not resolve on n1"
    assert failure_message("ranker", "FAILED", "FAILED", tmp_path, ["srun: error", line, line]).splitlines() == [
        f"[ranker] failed: {line}", f"logs of all ranks: {tmp_path}",
    ]  # fmt: skip


def test_what_the_scheduler_saw_is_told_where_no_rank_said_anything(tmp_path: Path) -> None:
    told = failure_message("ranker", "FAILED", "torchrun of node 0 was ended by SIGKILL", tmp_path, [])
    assert "no rank left a traceback of its own; torchrun of node 0 was ended by SIGKILL\nand nothing was" in told


def test_a_stage_that_was_asked_to_stop_is_told_as_preempted_and_not_as_failed(tmp_path: Path) -> None:
    mark = Mark(step=40, signal="SIGTERM", ranks=2, time="2026-11-30T20:00:00Z", seconds=1.5)
    told = failure_message("ranker", "FAILED", "FAILED", tmp_path, ["torchrun's own words"], mark)
    assert told == "[ranker] preempted at step 40; start again to resume"


@pytest.mark.parametrize(
    ("state", "scheduler", "said"),
    [
        ("CANCELLED", "CANCELLED", "was cancelled by somebody at the scheduler: state CANCELLED"),
        ("FAILED", "TIMEOUT", "reached the scheduler's time limit (run.scheduler_options.time): state TIMEOUT"),
    ],
)
def test_why_a_scheduler_asked_a_stage_to_stop_is_told_too(
    tmp_path: Path, state: str, scheduler: str, said: str
) -> None:
    mark = Mark(step=40, signal="SIGTERM", ranks=2, time="2026-11-30T20:00:00Z", seconds=0.3)
    told = failure_message("ranker", state, scheduler, tmp_path, [], mark)
    assert told == f"[ranker] {said}; preempted at step 40; start again to resume"
