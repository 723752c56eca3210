"""Run stages under torchrun, as the driver starts them, for tests that signal or kill their processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.components.golden import ROOT

LIMIT_S = 240


@contextlib.contextmanager
def job(
    module: str,
    arguments: Sequence[str],
    log: Path,
    *,
    ranks: int = 2,
    environment: Mapping[str, str] | None = None,
    torchrun: Sequence[str] = (),
) -> "Iterator[subprocess.Popen[bytes]]":
    """Start a stage, yield torchrun's process, and kill the remaining processes at the end.

    Args:
        module: the module that every rank runs.
        arguments: the module's arguments.
        log: the file for standard output and error.
        ranks: the number of ranks.
        environment: further environment variables.
        torchrun: further options of torchrun.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        "--signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        *torchrun, "-m", module, *arguments,
    ]  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
        try:
            yield process
        finally:
            left = ranks_of(process.pid)
            for pid in [process.pid, *left]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until a condition holds; fail if the job ends or the limit is exceeded first."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def ranks_of(pid: int) -> list[int]:
    """Return the ids of torchrun's child processes in the order of their ranks."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                words = (file.parent / "environ").read_bytes().split(b"\0")
                rank = next((word for word in words if word.startswith(b"LOCAL_RANK=")), None)
                if rank is not None:
                    found[int(rank.partition(b"=")[2])] = int(file.parent.name)
    return [found[rank] for rank in sorted(found)]
