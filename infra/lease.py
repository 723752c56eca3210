"""The lease of an output: it decides which of the jobs launched for the output may commit.

Before it launches a job, the driver writes a file beside the output with a token, and passes the token to the job in an
environment variable. For a URL the file is also in the store, where jobs on other hosts read it. A job whose token is
no longer in the file was superseded, though it may still run unnoticed. Its later commits, including checkpoints, are
refused (`infra.commit.committing`). A stage run by hand has no lease and needs none.
"""

import json
import os
from pathlib import Path

from sidestack.infra.errors import CommitError
from sidestack.infra.remote.copies import read_bytes
from sidestack.infra.remote.urls import address, local_path

VARIABLE = "SIDESTACK_LEASE"
"""The environment variable with the token and, after a space, the lease's file."""


def lease_file(out: Path) -> Path:
    """Return the file beside an output that holds the token of its job."""
    return out.with_name(f"{out.name}.job.json")


def lease_of(out: Path, token: str) -> str:
    """Return the value of `VARIABLE` for a job."""
    return f"{token} {address(lease_file(out).absolute())}"


def require_lease() -> None:
    """Check that this process's job still holds its lease; no-op in a process that no driver launched.

    Raises:
        CommitError: another job was launched in its place, or the driver considered it ended.
    """
    token, _, file = os.environ.get(VARIABLE, "").partition(" ")
    if token and _token_in(local_path(file)) != token:
        raise CommitError(
            f"{file}: this job no longer holds the lease of its output: the driver took it for ended, or launched"
            " another; nothing was committed"
        )


def _token_in(file: Path) -> str | None:
    """Return the token in a lease's file; None if there is no file, or it is not a lease file."""
    try:
        record = json.loads(read_bytes(file))
    except (OSError, ValueError):
        return None
    token = record.get("token") if isinstance(record, dict) else None
    return token if isinstance(token, str) else None
