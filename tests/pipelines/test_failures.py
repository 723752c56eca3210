"""The cause of a job's failure, found in the error files of its ranks and the output of torchrun and the scheduler."""

import json
import os
from pathlib import Path

import pytest

from sidestack.infra.preemption import Mark
from sidestack.pipelines.failures import failure_message


def write_error_file(logs: Path, node: str, rank: int, message: str, at: int, attempt: int = 0) -> None:
    directory = logs / node / f"attempt_{attempt}" / str(rank)
    directory.mkdir(parents=True)
    extra = {"py_callstack": f"Traceback of {message}", "timestamp": str(at)}
    report = {"message": {"message": message, "extraInfo": extra}}
    directory.joinpath("error.json").write_text(json.dumps(report))


def why(logs: Path) -> str:
    return failure_message("encoder", "FAILED", "", logs, ["bash: python: command not found"])


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    write_error_file(tmp_path, "job_a", 0, "ValueError: late", 20)
    write_error_file(tmp_path, "job_a", 1, "ValueError: early", 10)
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
def test_failure_caused_by_another_ranks_failure_is_not_the_cause(tmp_path: Path, echo: str) -> None:
    logs = tmp_path / "abc.logs"
    write_error_file(logs, "job_a", 0, echo, 9)
    write_error_file(logs, "job_a", 1, "DataError: column click", 10)
    assert "rank 1: DataError: column click\n" in why(logs)


def test_killed_rank_is_reported_with_the_output_of_torchrun(tmp_path: Path) -> None:
    write_error_file(tmp_path, "job_a", 0, "RuntimeError: Connection reset by peer", 9)
    seen = ["  rank      : 1 (local_rank: 1)", "  traceback : Signal 9 (SIGKILL) received by PID 7", *["more"] * 20]
    assert "traceback : Signal 9 (SIGKILL) received by PID 7\n" in failure_message(
        "ranker", "FAILED", "", tmp_path, seen
    )


def test_missing_user_file_is_a_cause(tmp_path: Path) -> None:
    logs = tmp_path / "abc.logs"
    write_error_file(logs, "job_a", 0, "FileNotFoundError: [Errno 2] No such file or directory: '/data/raw.csv'", 9)
    write_error_file(logs, "job_a", 1, "KeyError: later", 10)
    assert "raw.csv" in why(logs)


def test_users_fault_is_reported_without_traceback(tmp_path: Path) -> None:
    write_error_file(tmp_path, "job_a", 0, "DataError: column click", 10)
    assert "Traceback" not in why(tmp_path)


def test_node_is_named_when_there_are_several(tmp_path: Path) -> None:
    write_error_file(tmp_path, "job_a", 0, "KeyError: late", 20)
    write_error_file(tmp_path, "job_b", 0, "KeyError: early", 10)
    assert "local rank 0 in job_b: Traceback of KeyError: early" in why(tmp_path)


def test_only_the_last_attempt_counts(tmp_path: Path) -> None:
    write_error_file(tmp_path, "job_a", 0, "KeyError: fixed by a restart", 10, attempt=0)
    write_error_file(tmp_path, "job_a", 0, "KeyError: final", 20, attempt=1)
    assert "final" in why(tmp_path) and "fixed" not in why(tmp_path)


def test_last_output_lines_are_shown_when_no_rank_wrote_an_error_file(tmp_path: Path) -> None:
    assert "bash: python: command not found" in why(tmp_path / "nowhere")


def test_file_written_first_is_the_cause_of_failures_in_the_same_second(tmp_path: Path) -> None:
    for rank, message in ((0, "KeyError: later"), (1, "KeyError: earlier")):
        write_error_file(tmp_path, "job_a", rank, message, 10)
    written = {rank: tmp_path / f"job_a/attempt_0/{rank}/error.json" for rank in (0, 1)}
    os.utime(written[0], ns=(0, 2_000))
    os.utime(written[1], ns=(0, 1_000))
    assert "rank 1: Traceback of KeyError: earlier\n" in why(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"message": {"message": 1}}', '{"message": null}', "\xff"])
def test_truncated_error_file_is_reported_only_when_there_is_no_other(tmp_path: Path, text: str) -> None:
    logs = tmp_path / "abc.logs"
    write_error_file(logs, "job_a", 0, "unread", 9)
    (logs / "job_a/attempt_0/0/error.json").write_bytes(text.encode("latin-1"))
    assert "rank 0: its error file cannot be read" in why(logs) and "is the disk full?" in why(logs)
    write_error_file(logs, "job_a", 1, "CommitError: /runs/abc: no space left on the disk", 10)
    assert "failed: rank 1: CommitError: /runs/abc: no space left on the disk\n" in why(logs)


def test_failed_checkpoint_write_is_reported_as_the_cause(tmp_path: Path) -> None:
    logs = tmp_path / "abc.logs"
    missing = "FileNotFoundError: [Errno 2] No such file or directory: '/r/abc.checkpoint/.step-9.aa.tmp/rank1.json'"
    write_error_file(logs, "job_a", 1, missing, 9)
    write_error_file(logs, "job_a", 0, "CommitError: /r/abc.checkpoint/step-9: no space left on the disk", 10)
    assert "failed: rank 0: CommitError: /r/abc.checkpoint/step-9: no space left on the disk\n" in why(logs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("torch...RendezvousTimeoutError", "the job's nodes did not meet in time (run.rendezvous_s)"),
        ("torch...RendezvousConnectionError: The connection to", "a node could not reach the job's first node"),
    ],
)
def test_failed_rendezvous_is_reported(tmp_path: Path, line: str, message: str) -> None:
    assert message in failure_message("ranker", "FAILED", "", tmp_path, ["Traceback", line])


def test_unresolvable_host_is_the_only_reported_reason(tmp_path: Path) -> None:
    line = "rendezvous: host 'n9' does not resolve on n1"
    assert failure_message("ranker", "FAILED", "FAILED", tmp_path, ["srun: error", line, line]).splitlines() == [
        f"[ranker] failed: {line}", f"logs of all ranks: {tmp_path}",
    ]  # fmt: skip


def test_schedulers_message_is_reported_when_no_rank_left_a_traceback(tmp_path: Path) -> None:
    message = failure_message("ranker", "FAILED", "torchrun of node 0 was ended by SIGKILL", tmp_path, [])
    assert "no rank left a traceback of its own; torchrun of node 0 was ended by SIGKILL\nand nothing was" in message


def test_stage_asked_to_stop_is_reported_as_preempted_and_not_as_failed(tmp_path: Path) -> None:
    mark = Mark(step=40, signal="SIGTERM", ranks=2, time="2026-11-30T20:00:00Z", seconds=1.5)
    message = failure_message("ranker", "FAILED", "FAILED", tmp_path, ["torchrun's own words"], mark)
    assert message == "[ranker] preempted at step 40; start again to resume"


@pytest.mark.parametrize(
    ("state", "scheduler", "reason"),
    [
        ("CANCELLED", "CANCELLED", "was cancelled by somebody at the scheduler: state CANCELLED"),
        ("FAILED", "TIMEOUT", "reached the scheduler's time limit (run.scheduler_options.time): state TIMEOUT"),
    ],
)
def test_preempted_stage_is_reported_with_the_schedulers_reason(
    tmp_path: Path, state: str, scheduler: str, reason: str
) -> None:
    mark = Mark(step=40, signal="SIGTERM", ranks=2, time="2026-11-30T20:00:00Z", seconds=0.3)
    message = failure_message("ranker", state, scheduler, tmp_path, [], mark)
    assert message == f"[ranker] {reason}; preempted at step 40; start again to resume"
