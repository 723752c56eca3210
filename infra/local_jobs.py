"""Jobs on this machine that survive their driver, and that another driver can find again.

torchx puts the job's handle into the environment of every process of a job. This identifies the processes without a
record of process ids, including those that survived torchrun.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler
from torchx.specs import AppState

from sidestack.infra import lease

GRACE_S = 30.0
"""Time for processes to end after SIGTERM, including checkpointing, before they are killed."""

_HANDLE = "TORCHX_JOB_ID"
_ENDED = (AppState.SUCCEEDED, AppState.FAILED, AppState.CANCELLED)
_POLL_S = 0.1


class LocalJobs(LocalScheduler):  # type: ignore[misc]  # torchx is not typed
    """The scheduler `local_cwd`, extended to follow, cancel and leave jobs that another process launched."""

    def __init__(self, session_name: str) -> None:
        super().__init__(session_name, image_provider_class=CWDImageProvider)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """Return a job's state; None: another process launched it, and none of its processes is running."""
        app = self._apps.get(app_id)
        if app is None:
            return DescribeAppResponse(app_id=app_id, state=AppState.RUNNING) if self._processes(app_id) else None
        nodes = [node for role in app.role_replicas.values() for node in role]
        if any(node.is_alive() for node in nodes):
            return DescribeAppResponse(app_id=app_id, state=AppState.RUNNING)
        if app.state not in _ENDED:
            app.set_state(AppState.FAILED if any(node.failed() for node in nodes) else AppState.SUCCEEDED)
            _signal(self._processes(app_id), signal.SIGKILL)  # ranks whose torchrun was killed
            app.close()
        ends = (f"torchrun of node {node.replica_id} {_ended(node.proc.returncode)}" for node in nodes if node.failed())
        return DescribeAppResponse(app_id=app_id, state=app.state, msg=", ".join(ends))

    def find(self, token: str) -> str | None:
        """Return the job that holds a lease's token; None: no process of such a job is running."""
        for _, variables in _environments():
            if variables.get(lease.VARIABLE, "").startswith(f"{token} "):
                return variables.get(_HANDLE, "").rpartition("/")[2] or None
        return None

    def log_files(self, app_id: str, role: str, num_nodes: int, log_dir: Path) -> list[Path]:
        """Return the file of each node's stderr."""
        return [log_dir / self.session_name / app_id / role / str(node) / "stderr.log" for node in range(num_nodes)]

    def leave(self, app_id: str) -> None:
        """Let a job continue when this process ends."""
        self._apps.pop(app_id, None)

    def close(self) -> None:
        """Cancel every job that this process launched and that neither ended nor was left running."""
        for app_id in list(self._apps):
            self._cancel_existing(app_id)

    def _cancel_existing(self, app_id: str) -> None:
        app = self._apps.get(app_id)
        if app is not None and app.state in _ENDED:
            return
        _end(lambda: self._processes(app_id), GRACE_S)
        if app is not None:
            app.set_state(AppState.CANCELLED)
            app.close()

    def _processes(self, app_id: str) -> list[int]:
        handle = f"local_cwd://{self.session_name}/{app_id}"
        return [pid for pid, variables in _environments() if variables.get(_HANDLE) == handle]


def _ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Yield process id and environment of this user's processes, except those that have ended."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        yield int(folder.name), dict(word.split("=", 1) for word in words if "=" in word)


def _end(find: Callable[[], list[int]], grace_s: float) -> None:
    """End processes: send SIGTERM to those without a parent among them, which forward it; later SIGKILL to the rest.

    Args:
        find: returns the ids of the processes that are left. grace_s: seconds before SIGKILL.
    """
    asked = set[int]()
    deadline = time.monotonic() + grace_s
    while left := find():
        if time.monotonic() > deadline:
            _signal(left, signal.SIGKILL)
        else:
            heads = [pid for pid in left if _parent(pid) not in left and pid not in asked]
            _signal(heads, signal.SIGTERM)
            asked |= set(heads)
        time.sleep(_POLL_S)


def _parent(pid: int) -> int | None:
    try:
        # "pid (name) state ppid": the name may contain spaces and brackets
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue
