"""What the tests on Slurm ask its programs for."""

import subprocess

from tests.pipelines.driver import wait_until


def call(*command: str) -> str:
    """Return what a program of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def state_of(job: str) -> str:
    """Return a job's state, such as RUNNING."""
    return call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T").strip()


def start_now(job: str) -> None:
    """Take from a requeued job the two minutes that Slurm has it wait."""
    wait_until(lambda: state_of(job) == "PENDING", f"job {job} is queued again")
    call("scontrol", "update", f"jobid={job}", "StartTime=now")
