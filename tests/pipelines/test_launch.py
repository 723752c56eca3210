"""Why a job failed, from what torchrun leaves behind."""

import json
from pathlib import Path

import pytest
from torchx.specs import AppState

from pipelines.launch import _why


def leave(logs: Path, node: str, rank: int, message: str, at: int, attempt: int = 0) -> None:
    directory = logs / node / f"attempt_{attempt}" / str(rank)
    directory.mkdir(parents=True)
    extra = {"py_callstack": f"Traceback of {message}", "timestamp": str(at)}
    report = {"message": {"message": message, "extraInfo": extra}}
    directory.joinpath("error.json").write_text(json.dumps(report))


def why(logs: Path) -> str:
    return _why("encoder", AppState.FAILED, logs, ["bash: python: command not found"])


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
    assert "traceback : Signal 9 (SIGKILL) received by PID 7\n" in _why("ranker", AppState.FAILED, tmp_path, seen)


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
