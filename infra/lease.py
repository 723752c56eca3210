"""The lease of an output: which of the jobs that were launched for it may commit.

The driver writes a file beside the output before it launches a job, with a token that the job is told in its
environment; beside a URL the file lies in the store, too, where jobs on other hosts read it. A job whose token is no
longer in the file was superseded, though it may live on unseen; whatever it commits from then on, its checkpoints
included, is refused (`infra.commit.committing`). A stage run by hand has no lease and needs none.
"""

import json
import os
from pathlib import Path

from sidestack.infra.errors import CommitError
from sidestack.infra.remote.copies import read_bytes
from sidestack.infra.remote.urls import address, place

VARIABLE = "SIDESTACK_LEASE"
"""Holds the token and, after a space, the lease's file."""


def lease_file(out: Path) -> Path:
    """Return the file beside an output that has the token of its job."""
    return out.with_name(f"{out.name}.job.json")


def lease_of(out: Path, token: str) -> str:
    """Return the value of `VARIABLE` for a job."""
    return f"{token} {address(lease_file(out).absolute())}"


def require_lease() -> None:
    """Check that this process's job still holds its lease; no-op in a process that no driver launched.

    Raises:
        CommitError: another job was launched in its place, or the driver took it for ended.
    """
    token, _, file = os.environ.get(VARIABLE, "").partition(" ")
    if token and _token_in(place(file)) != token:
        raise CommitError(
            f"{file}: this job no longer holds the lease of its output: the driver took it for ended, or launched"
            " another; nothing was committed"
        )


def _token_in(file: Path) -> str | None:
    """Return the token in a lease's file; None where there is no file, or it is not a lease's."""
    try:
        record = json.loads(read_bytes(file))
    except (OSError, ValueError):
        return None
    token = record.get("token") if isinstance(record, dict) else None
    return token if isinstance(token, str) else None
