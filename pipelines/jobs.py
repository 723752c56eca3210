"""A stage's work as a job, and the job's record on disk, through which another driver finds it."""

import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from sidestack.infra.config import Config
from sidestack.infra.errors import StageError
from sidestack.infra.files import write_whole
from sidestack.infra.lease import lease_file
from sidestack.infra.remote.copies import read_bytes, remove_file
from sidestack.infra.remote.urls import local_path


@dataclass(frozen=True)
class Work:
    """A stage's work, ready to launch.

    Attributes:
        label: the stage's name for people. key: identifies the work. out: the directory that its job commits.
        limit_s: seconds after which the job is cancelled, including time in a queue.
    """

    label: str
    key: str
    out: Path
    limit_s: float

    @property
    def rank_logs(self) -> Path:
        """The folder of torchrun's rank logs."""
        return self.out.with_name(f"{self.out.name}.logs")


class JobRecord(Config):
    """A job's record beside its output, which is also the output's lease (`infra.lease`).

    It is written before the job is submitted, again with the scheduler's handle, and removed once the job is known to
    have ended.
    """

    token: str = Field(default_factory=lambda: uuid.uuid4().hex)
    """Token of the lease."""
    scheduler: str
    handle: str = ""
    """torchx's handle; empty until the job is submitted."""
    label: str
    key: str
    out: str
    role: str
    nodes: int
    log_dir: str
    """The folder of the nodes' logs, if the scheduler writes them to files."""
    host: str = Field(default_factory=socket.gethostname)
    """The driver's host name."""
    began: float = Field(default_factory=time.time)
    """Unix time of the submission, in seconds."""
    is_cancelled: bool = False

    def write(self) -> None:
        """Write the record atomically."""
        write_whole(lease_file(local_path(self.out)), self.model_dump_json(indent=1).encode())

    def has_lease(self) -> bool:
        """Return whether this job still has the output's lease: its end was not handled, and no other was launched."""
        found = read_record(local_path(self.out))
        return found is not None and found.token == self.token

    def remove(self) -> None:
        """Remove the record, if it is still this job's; this ends the output's lease."""
        if self.has_lease():
            remove_file(lease_file(local_path(self.out)))


def read_record(out: Path) -> JobRecord | None:
    """Return the record of an output's job; None if there is none.

    Raises:
        StageError: the file is not a record.
    """
    file = lease_file(out)
    try:
        return JobRecord.model_validate_json(read_bytes(file))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise StageError(
            f"{file}: is not the record of a job ({error.error_count()} faults); remove it once no job writes {out}"
        ) from error
