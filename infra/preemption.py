"""Preemption of a stage: the signals, the mark file, and the exit status.

SIGTERM, or a scheduler's warning by SIGUSR1, asks a stage to stop. All ranks then stop at one step, save it, and exit
with `EXIT_STATUS`; rank 0 writes a mark beside the output, `<out>.preempted.json`. torchrun exits with 1 both after a
clean stop and after a failure; the mark distinguishes them. The next start removes it.
"""

import signal
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from sidestack.infra.config import Config
from sidestack.infra.errors import PreemptedError, RemoteError
from sidestack.infra.files import write_whole
from sidestack.infra.remote.copies import read_bytes, remove_file

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_STATUS = 128 + signal.SIGTERM


class Mark(Config):
    """The mark of a preempted stage.

    Attributes:
        step: the saved step, from which the next start resumes; None: it resumes from what was committed before the
            signal (checkpoints, parts of the output).
        signal: the signal that rank 0 got; None: another rank got it.
        ranks: the number of ranks. time: when the mark was written, UTC, ISO 8601.
        seconds: from the signal, if rank 0 got one, to the mark.
    """

    step: int | None
    signal: str | None
    ranks: int
    time: str
    seconds: float | None

    def __str__(self) -> str:
        """Return the mark as one line of text."""
        at = "before a step was saved" if self.step is None else f"at step {self.step}"
        return f"preempted {at}; start again to resume"


def write_mark(out: Path, stop: PreemptedError, ranks: int, seconds: float | None) -> None:
    """Write the mark beside an output; called on rank 0."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    mark = Mark(step=stop.step, signal=stop.signal, ranks=ranks, time=now, seconds=seconds)
    write_whole(_file(out), (mark.model_dump_json(indent=1) + "\n").encode())


def read_mark(out: Path) -> Mark | None:
    """Return the mark beside a stage's output; None: the stage was not preempted."""
    try:
        return Mark.model_validate_json(read_bytes(_file(out)))
    except (OSError, ValidationError, RemoteError):
        return None


def remove_mark(out: Path) -> None:
    """Remove the mark, when the stage is started again."""
    remove_file(_file(out))


def _file(out: Path) -> Path:
    return Path(out).with_name(f"{Path(out).name}.preempted.json")
