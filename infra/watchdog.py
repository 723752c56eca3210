"""The watchdog of a rank: a thread that names the rank that others wait for, and ends a wait for a stalled rank.

Each rank's watchdog writes its heartbeat (`infra.heartbeat`). When its main thread makes no progress for a while, it
reads the heartbeats of the others. A rank is *stalled* if its heartbeat stops (it was killed, stopped, or has lost the
disk), or if its steps, its processor time and the bytes that it reads and writes all stand still while it does not wait
for others. A warning names it after `Timeouts.warning_s`. After `collective_s`, or `commit_s` for work around a commit,
the watchdog ends its own process with an error that names the stalled rank, and the launcher ends the rest. There is no
time limit for a rank that makes progress.

The watchdog also handles stop signals, even while the main thread is in a call that returns to Python late.
"""

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sidestack.infra.distributed import Timeouts, World
from sidestack.infra.errors import PreemptedError, StalledError
from sidestack.infra.heartbeat import Beat, Heartbeats, PeerBeat
from sidestack.infra.logs import LOG
from sidestack.infra.preemption import EXIT_STATUS, SIGNALS, write_mark

_MOST_SECONDS = 5.0
_MISSED = 3
"""The number of missed heartbeats after which a rank counts as silent."""
_CLOSE = b"\0"


@contextlib.contextmanager
def watching(world: World, out: Path, timeouts: Timeouts, record: Callable[[BaseException], None]) -> Iterator[None]:
    """Run a watchdog beside the body, which is a stage's work, and handle stop signals; every rank enters.

    Args:
        world: the process group. out: the stage's output. timeouts: see `infra.distributed.Timeouts`.
        record: puts an error where the launcher finds it.
    """
    watchdog = _Watchdog(world, out, timeouts, record)
    if world.size > 1:
        # The watchdog ends waits for stalled ranks, so gloo's own timeout can be long. NCCL, which waits on the device,
        # keeps its timeout.
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        backend._set_default_timeout(timedelta(seconds=timeouts.commit_s))
    with _signals_to(watchdog.wakeup, world):
        watchdog.start()
        try:
            yield
        finally:
            watchdog.close()


@contextlib.contextmanager
def _signals_to(ear: socket.socket, world: World) -> Iterator[None]:
    """Handle the signals that ask a stage to stop: the handler sets a flag and wakes the watchdog."""

    def ask(number: int, frame: object) -> None:
        world.state.ask_to_stop(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    heard_before = signal.set_wakeup_fd(ear.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(heard_before)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Watchdog:
    """The watchdog's thread; see the module."""

    def __init__(self, world: World, out: Path, timeouts: Timeouts, record: Callable[[BaseException], None]) -> None:
        self.world = world
        self.out = out
        self.timeouts = timeouts
        self.wakeup, self._wakeup_end = socket.socketpair()
        self._record = record
        self._heartbeats = Heartbeats(out, world.rank, world.size)
        self._every = min(_MOST_SECONDS, timeouts.warning_s / 4)
        self._warn_after_s = timeouts.warning_s
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
        self.wakeup.setblocking(False)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.wakeup.send(_CLOSE)
        self._thread.join()
        for end in (self.wakeup, self._wakeup_end):
            end.close()
        self._heartbeats.remove()

    def _run(self) -> None:
        while True:
            beat = self._heartbeats.beat(self.world.state)
            self._watch(beat)
            self._exit_if_stop_is_overdue()
            if select.select([self._wakeup_end], [], [], self._every)[0] and self._handle_signals():
                return

    def _handle_signals(self) -> bool:
        """Handle received signals; return whether the stage has ended."""
        heard = self._wakeup_end.recv(64)
        for number in SIGNALS:
            if number in heard:
                self.world.state.ask_to_stop(signal.Signals(number).name)
        return _CLOSE in heard

    def _watch(self, own: Beat) -> None:
        """Log which ranks are waited for, and end a wait for a stalled rank."""
        if own.since_s < 2 * self._every:
            self._warn_after_s = self.timeouts.warning_s
            return
        stalled = self._blocking_ranks(own)
        if not stalled:
            return
        if own.since_s >= self._warn_after_s:
            self._warn_after_s = 2 * own.since_s
            LOG.warning(self._stall_message(own, stalled))
        if self.world.size == 1:  # no other rank waits for it
            return
        for one in stalled:
            limit, setting = self._limit(one, own)
            stalled_s = one.silent_s if self._is_silent(one) else one.beat.idle_s
            if stalled_s >= limit and own.since_s >= limit:
                self._end(
                    StalledError(f"{self._stall_message(own, [one])}; run.timeouts.{setting}={limit:g} is over"), 1
                )

    def _blocking_ranks(self, own: Beat) -> list[PeerBeat]:
        """Return the ranks that block this one: those without heartbeat, else those not waiting, or itself if idle."""
        others = list(self._heartbeats.others())
        if silent := [one for one in others if self._is_silent(one)]:
            return silent
        if own.is_waiting:
            return [one for one in others if not one.beat.is_waiting]
        is_idle = own.idle_s >= self.timeouts.warning_s
        return [PeerBeat(self.world.rank, own, 0.0)] if is_idle else []

    def _is_silent(self, one: PeerBeat) -> bool:
        return one.silent_s > _MISSED * self._every

    def _limit(self, one: PeerBeat, own: Beat) -> tuple[float, str]:
        if not self._is_silent(one) and (own.is_committing or one.beat.is_committing):
            return self.timeouts.commit_s, "commit_s"
        return self.timeouts.collective_s, "collective_s"

    def _stall_message(self, own: Beat, stalled: list[PeerBeat]) -> str:
        if [one.rank for one in stalled] == [self.world.rank]:
            return self._describe_rank(stalled[0])
        here = f"rank {self.world.rank} has {'waited in' if own.is_waiting else 'been in'} {own.doing!r}"
        return f"{here} for {own.since_s:.0f} s; " + "; ".join(map(self._describe_rank, stalled))

    def _describe_rank(self, one: PeerBeat) -> str:
        if self._is_silent(one):
            return f"rank {one.rank} has sent no heartbeat for {one.silent_s:.0f} s, its last from {one.beat.doing!r}"
        if one.beat.idle_s >= self.timeouts.warning_s:
            return f"rank {one.rank} has made no progress in {one.beat.doing!r} for {one.beat.idle_s:.0f} s"
        return f"rank {one.rank} works in {one.beat.doing!r} for {one.beat.since_s:.0f} s"

    def _exit_if_stop_is_overdue(self) -> None:
        """End this process if the ranks have not agreed to stop within `stop_s`: one is in longer work."""
        state, asked_s = self.world.state, self.world.state.asked_s
        if asked_s is None or asked_s < self.timeouts.stop_s or state.must_stop or not state.may_stop:
            return
        # A failed rank has no heartbeat, and a killed one none with the signal: then this is not a preemption.
        asked = [one for one in self._heartbeats.others() if one.beat.has_signal]
        stop = PreemptedError(state.signal)
        if len(asked) == self.world.size - 1 and self.world.is_main:
            write_mark(self.out, stop, self.world.size, asked_s)
        self._end(stop, EXIT_STATUS)

    def _end(self, error: Exception, status: int) -> None:
        try:
            raise error
        except type(error):
            self._record(error)  # with a traceback
        LOG.error(error)
        os._exit(status)  # the main thread is in a call that does not return
