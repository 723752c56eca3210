"""The interface of object stores, and the choice of the store for a URL.

Requests to a store that has answered this process before are retried for some minutes while it is unreachable, so that
an outage does not end a day's training. A store that has never answered causes an error at once.
"""

import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sidestack.infra.errors import RemoteError
from sidestack.infra.logs import LOG

T = TypeVar("T")

RETRY_S = 300.0
"""How long requests to a store that has answered before are retried."""
_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 30.0


class Found(NamedTuple):
    """An object of a store.

    Attributes:
        key: its name within the bucket. size: its bytes. stamp: changes when it is rewritten.
    """

    key: str
    size: int
    stamp: int


class Objects(Protocol):
    """The objects of a bucket, by key. A failed or refused request raises a `RemoteError` that names the URL."""

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes; None: there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Write an object, or replace it."""

    def write_new(self, key: str, content: bytes, writer: str) -> bool:
        """Write an object unless there is one; return whether it is this writer's, which may retry the call."""

    def upload(self, file: Path, key: str) -> None:
        """Write a local file's bytes as an object, which appears atomically."""

    def download(self, key: str, file: Path) -> None:
        """Write an object's bytes into a local file."""

    def listed(self, prefix: str, at_most: int | None = None) -> list[Found]:
        """Return the objects whose keys begin with a prefix, in order; all, or the first `at_most`."""

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are ignored."""


class UnavailableError(RemoteError):
    """A store does not answer, or is temporarily unavailable."""


class Retries:
    """Retries for one store that is unreachable, if it has answered before."""

    def __init__(self) -> None:
        self._has_answered = threading.Event()

    def call(self, call: Callable[[], T]) -> T:
        """Return the result of a call, with retries.

        Raises:
            RemoteError: the call's own; for an unreachable store if it never answered or is away for too long.
        """
        began, pause = time.monotonic(), _PAUSE_S
        while True:
            try:
                answer = call()
            except UnavailableError as error:
                waited = time.monotonic() - began
                if not self._has_answered.is_set() or waited > RETRY_S:
                    raise
                if pause == _PAUSE_S:
                    LOG.warning(f"{error}; it is asked again for up to {RETRY_S / 60:g} minutes")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            except RemoteError:
                self._has_answered.set()
                raise
            else:
                self._has_answered.set()
                return answer


def objects_of(url: str) -> tuple[Objects, str]:
    """Return the store of a URL, and the URL's key in it.

    Raises:
        RemoteError: a package for the store's client is not installed, or there are no credentials.
    """
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    return _opened(scheme, host, os.getpid()), key


@functools.cache  # per process id: a fork must not share connections
def _opened(scheme: str, host: str, process: int) -> Objects:
    if scheme == "s3":
        from sidestack.infra.remote.s3 import S3Objects

        return S3Objects(host)
    from sidestack.infra.remote.arrow import ArrowObjects, filesystem_of

    return ArrowObjects(filesystem_of(scheme, host), scheme, host)
