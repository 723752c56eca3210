"""The lock of a folder, with flock and on a filesystem without flock."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sidestack.infra.locks import LockHeldError, locked
from sidestack.pipelines.run import AlreadyRunningError, run_lock


@pytest.fixture(params=["flock", "no flock"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "no flock":
        without_flock(monkeypatch)
    return tmp_path / ".lock"


def without_flock(patch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(fcntl, "flock", refuse)


def test_lock_has_one_holder_at_a_time(file: Path) -> None:
    with locked(file, wait=False):
        with pytest.raises(LockHeldError):
            with locked(file, wait=False):
                pass
    with (
        locked(file, wait=False),
        pytest.raises(AlreadyRunningError, match="another driver is running here"),
        run_lock(file.parent),
    ):
        pass


def test_waiting_thread_gets_the_lock_when_it_is_released(file: Path) -> None:
    order = []

    def wait() -> None:
        with locked(file, wait=True):
            order.append("second")

    with locked(file, wait=False):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_missing_flock_is_logged_and_the_lock_file_names_the_owner(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_flock(monkeypatch, number)
    with locked(tmp_path / ".lock", wait=False):
        assert (tmp_path / ".lock.owner").read_text().startswith(f"{socket.gethostname()} {os.getpid()} ")
        with pytest.raises(LockHeldError, match=f"process {os.getpid()} on {socket.gethostname()} holds .*.lock.owner"):
            with locked(tmp_path / ".lock", wait=False):
                pass
    assert not (tmp_path / ".lock.owner").exists()
    assert f"warning: {tmp_path}: has no flock" in capsys.readouterr().err


def test_lock_of_a_dead_process_is_taken_over_unless_it_is_of_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_flock(monkeypatch)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    owner = tmp_path / ".lock.owner"
    owner.write_text(f"{socket.gethostname()} {ended.pid} 0")
    with locked(tmp_path / ".lock", wait=False):
        assert str(os.getpid()) in owner.read_text()
    owner.write_text("another-host 1 0")
    with pytest.raises(LockHeldError, match="process 1 on another-host"), locked(tmp_path / ".lock", wait=False):
        pass
    assert [file.name for file in sorted(tmp_path.iterdir())] == [".lock", ".lock.owner"]


def test_other_error_of_flock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError), locked(tmp_path / ".lock", wait=False):
        pass
