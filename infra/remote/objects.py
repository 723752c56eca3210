"""What we ask of an object store, and which one answers for a URL.

A store that has answered this process is asked again for some minutes when it is away, so that an outage does not end a
day's training; one that never answered is told of at once.
"""

import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from sidestack.infra.errors import RemoteError

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long a store that has answered before is asked again."""
_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 30.0


class Found(NamedTuple):
    """An object of a store.

    Attributes:
        key: its name within the bucket. size: its bytes. stamp: changes when it is written anew.
    """

    key: str
    size: int
    stamp: int


class Objects(Protocol):
    """The objects of a bucket, by key. What one cannot do, or is not allowed, is a `RemoteError` that names the URL."""

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes; None: there is none."""

    def write(self, key: str, content: bytes) -> None:
        """Write an object, or replace it."""

    def write_new(self, key: str, content: bytes, writer: str) -> bool:
        """Write an object unless there is one, and return whether it is this writer's, who may ask twice."""

    def upload(self, file: Path, key: str) -> None:
        """Write a local file's bytes as an object, which appears whole or not at all."""

    def download(self, key: str, file: Path) -> None:
        """Write an object's bytes into a local file."""

    def listed(self, prefix: str, at_most: int | None = None) -> list[Found]:
        """Return the objects whose keys begin with a prefix, in order: all, or the first ones."""

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is not there is no fault."""


class AwayError(RemoteError):
    """A store does not answer, or says that it cannot for now."""


class Patience:
    """Asks one store again when it is away, if it has answered before."""

    def __init__(self) -> None:
        self._has_answered = threading.Event()

    def asking(self, call: Callable[[], T]) -> T:
        """Return what a call returns.

        Raises:
            RemoteError: the call's own; of a store that is away, when it never answered or is away for too long.
        """
        began, pause = time.monotonic(), _PAUSE_S
        while True:
            try:
                answer = call()
            except AwayError as error:
                waited = time.monotonic() - began
                if not self._has_answered.is_set() or waited > PATIENCE_S:
                    raise
                if pause == _PAUSE_S:
                    told = f"warning: {error}; it is asked again for up to {PATIENCE_S / 60:g} minutes"
                    print(told, file=sys.stderr, flush=True)
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
        RemoteError: what the store's client needs is not installed, or it has no credentials.
    """
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    return _opened(scheme, host, os.getpid()), key


@functools.cache  # not shared with forks: connections are of the process that opened them
def _opened(scheme: str, host: str, process: int) -> Objects:
    if scheme == "s3":
        from sidestack.infra.remote.s3 import S3Objects

        return S3Objects(host)
    from sidestack.infra.remote.arrow import ArrowObjects, filesystem_of

    return ArrowObjects(filesystem_of(scheme, host), scheme, host)
