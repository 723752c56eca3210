"""The current work of a rank, and whether it was asked to stop.

One small object per process: the main thread records its current work, the signal handler a request to stop, and the
watchdog (`infra.watchdog`) reads both.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from sidestack.infra.errors import PreemptedError


@dataclass
class RankState:
    """The current work of one rank's main thread, and its stop request.

    Attributes:
        doing: the current work, such as ``reading events``. since: when that began, by `time.monotonic`.
        changes: counts the changes of `doing`.
        is_waiting: whether it waits in a collective for other ranks.
        is_committing: whether the work, or the wait, may take as long as a commit (`Timeouts.commit_s`).
        signal: the name of the signal that asked this rank to stop; None: there was none.
        asked_at: when the signal arrived, by `time.monotonic`.
        must_stop: whether some rank was asked to stop. Set by a collective, hence at the same place on every rank.
        may_stop: False during work that a stop request must not end, such as a commit.
    """

    doing: str = "starting"
    since: float = field(default_factory=time.monotonic)
    changes: int = 0
    is_waiting: bool = False
    is_committing: bool = False
    signal: str | None = None
    asked_at: float | None = None
    must_stop: bool = False
    may_stop: bool = True

    @property
    def asked_s(self) -> float | None:
        """The seconds since this rank was asked to stop; None: it was not."""
        return None if self.asked_at is None else time.monotonic() - self.asked_at

    def ask_to_stop(self, signal: str) -> None:
        """Record a signal; safe in a signal handler."""
        if self.asked_at is None:
            self.signal, self.asked_at = signal, time.monotonic()

    @contextlib.contextmanager
    def at(self, doing: str, is_committing: bool = False) -> Iterator[None]:
        """Record the work of the body."""
        before = self.doing, self.is_committing
        self.move(doing)
        self.is_committing = is_committing
        try:
            yield
        finally:
            self.move(before[0])
            self.is_committing = before[1]

    def move(self, doing: str) -> None:
        """Record the next work."""
        self.doing, self.since = doing, time.monotonic()
        self.changes += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Record that the body is a collective."""
        self.is_waiting, self.since = True, time.monotonic()
        self.changes += 1
        try:
            yield
        finally:
            self.is_waiting, self.since = False, time.monotonic()

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Let no stop request end the body, such as a commit or the last checkpoint before a stop."""
        before, self.may_stop = self.may_stop, False
        try:
            yield
        finally:
            self.may_stop = before

    def stop_if_asked(self) -> None:
        """Stop this rank's part of long work under `raise_on_all_ranks`, which then stops every rank.

        Raises:
            PreemptedError: this rank was asked to stop.
        """
        if self.may_stop and self.signal is not None:
            raise PreemptedError(self.signal)

    def stop_if_agreed(self) -> None:
        """Stop the work once all ranks have learned of a stop request.

        Raises:
            PreemptedError: some rank was asked to stop; raised on every rank that calls.
        """
        if self.may_stop and self.must_stop:
            raise PreemptedError(self.signal)
