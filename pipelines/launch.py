"""Stages' jobs on a scheduler: launch or find them, show their logs, and report how they end."""

import socket
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torchx.runner import Runner
from torchx.schedulers.api import Scheduler
from torchx.specs import AppDef, AppStatus, CfgVal, InvalidRunConfigException

from sidestack.infra import lease
from sidestack.infra.errors import ConfigError, SchedulerError, StageError, UnansweredError
from sidestack.infra.manifest import is_committed
from sidestack.infra.preemption import read_mark
from sidestack.infra.remote.urls import address
from sidestack.infra.schedulers import FACTORIES, Reattachable
from sidestack.infra.slurm import NEVER_STARTS
from sidestack.pipelines.failures import failure_message
from sidestack.pipelines.job_log import JobLog, log_line
from sidestack.pipelines.jobs import JobRecord, Work, read_record

T = TypeVar("T")

RETRY_S = 600.0
_POLL_S = 1.0
_SUBMIT_AGAIN_S = 5.0
_ENDING_S = 60.0


@dataclass(frozen=True)
class Job:
    """A running job.

    Attributes:
        work: its work. record: its record on disk. log: follows its logs.
        deadline: Unix time after which it is cancelled.
    """

    work: Work
    record: JobRecord
    log: JobLog
    deadline: float


@dataclass
class _Outage:
    """A period without answers from the scheduler; its begin and end are logged.

    Attributes:
        scheduler: its name. limit_s: how long it may last.
    """

    scheduler: str
    limit_s: float
    _since: float | None = field(default=None, init=False)

    def note(self, label: str, error: Exception) -> None:
        """Record an unanswered query.

        Raises:
            UnansweredError: there was no answer for too long.
        """
        now, reason = time.monotonic(), _first_line(error)
        if self._since is None:
            self._since = now
            minutes = f"{self.limit_s / 60:g} minutes"
            log_line(label, f"{self.scheduler} does not answer: {reason}; it is asked again for up to {minutes}")
        if now - self._since > self.limit_s:
            raise UnansweredError(
                f"[{label}] {self.scheduler} has not answered for {(now - self._since) / 60:.1f} minutes"
                f" (run.scheduler_retry_minutes): {reason}"
            )

    def end(self, label: str) -> None:
        """Record an answer."""
        if self._since is not None:
            log_line(label, f"{self.scheduler} answers again, after {time.monotonic() - self._since:.0f} s")
            self._since = None


class Launcher:
    """Launcher for one scheduler: starts jobs, finds those of an earlier driver, and reports their status."""

    def __init__(self, scheduler: str, options: Mapping[str, CfgVal], log_dir: Path, retry_s: float = RETRY_S) -> None:
        """Check the scheduler's options before anything runs.

        Args:
            scheduler: a name of `infra.schedulers.FACTORIES`.
            options: the scheduler's own options.
            log_dir: folder for the logs of schedulers that write files.
            retry_s: seconds for which an unanswered query is retried.

        Raises:
            ConfigError: the scheduler refuses an option, or lacks one it needs.
        """
        self._schedulers: dict[str, Scheduler[Any]] = {}
        self._runner = Runner("sidestack", {name: partial(self._make_scheduler, name) for name in FACTORIES})
        self._scheduler = scheduler
        self._log_dir = log_dir.absolute()
        self._outage = _Outage(scheduler, retry_s)
        self._waits: dict[str, str] = {}  # why a job waits, by its token
        try:
            known = self._runner.scheduler_run_opts(scheduler)
            # Without our own log_dir, torchx 0.7.0 deletes an earlier job's.
            extra = {"log_dir": str(self._log_dir)} if known.get("log_dir") is not None else {}
            self._options = {**extra, **options}
            known.resolve(self._options)
        except (InvalidRunConfigException, ValueError, ImportError) as error:
            raise ConfigError(f"run.scheduler {scheduler!r}: {error}") from error
        except Exception as error:  # such as a kubeconfig that is missing or broken
            raise ConfigError(f"run.scheduler {scheduler!r}: {_first_line(error)}") from error

    def start(self, work: Work, app: AppDef) -> Job:
        """Launch a job that takes the lease of its output; rank 0's lines are shown as they come.

        Raises:
            StageError: the scheduler refused the job, or did not answer for too long.
        """
        submission = _Outage(f"{self._scheduler} (submission)", self._outage.limit_s)
        while True:
            record = self._new_record(work, app)
            try:
                handle = self._submit(record, app, submission)
                if handle is not None:
                    record = record.model_copy(update={"handle": handle})
                    record.write()
                    return self._follow(work, record, is_new=True)
                time.sleep(_SUBMIT_AGAIN_S)
            except BaseException as error:
                if not isinstance(error, Exception):  # a signal: the job may have been submitted already
                    self._cancel_submission(record)
                raise

    def attach(self, work: Work) -> Job | None:
        """Return the live job of an output that an earlier driver launched; None if there is none.

        If a job may be running where it cannot be seen from here, its record is kept; its lease ends when another job
        is launched.

        Raises:
            StageError: the scheduler did not answer for too long, or a job that was cancelled does not end.
        """
        record = read_record(work.out)
        if record is None:
            return None
        if record.scheduler == "local_cwd" and record.host != socket.gethostname():
            log_line(work.label, f"its job on host {record.host} cannot be seen from here; another takes its place")
            return None
        handle = record.handle or self._find_with_retries(record)
        if handle is None:
            if isinstance(self._scheduler_of(record.scheduler), Reattachable):
                record.remove()
            return None
        record = record.model_copy(update={"handle": handle})
        if record.is_cancelled:
            if not self._wait_for_end(record):
                raise StageError(f"[{work.label}] {handle} was cancelled and still runs; try again once it has ended")
            return None
        if not self._is_alive(self._status(record)):
            record.remove()
            return None
        since = datetime.fromtimestamp(record.began, UTC).isoformat(timespec="minutes")
        log_line(work.label, f"is under way as {handle} since {since}; following it")
        record.write()
        return self._follow(work, record, is_new=False)

    def has_succeeded(self, job: Job) -> bool:
        """Return whether a job has succeeded; False while it is running or the scheduler does not answer.

        Raises:
            StageError: the job failed, with the failing rank's traceback, took too long, or the scheduler did not
                answer for too long.
        """
        try:
            status = self._runner.status(job.record.handle)
        except Exception as error:
            self._outage.note(job.work.label, error)
            return False
        self._outage.end(job.work.label)
        if self._is_alive(status):
            if time.time() > job.deadline:
                self.cancel(job)
                raise StageError(f"[{job.work.label}] was cancelled after {job.work.limit_s / 60:g} minutes")
            self._log_wait(job, "" if status is None else status.msg)
            return False
        job.log.stop()
        # For a job of an earlier driver on this machine, the commit is the only sign that it succeeded.
        state = status.state.name if status is not None else "SUCCEEDED" if is_committed(job.work.out) else "ENDED"
        if state != "SUCCEEDED":
            message = "" if status is None else status.msg
            job.record.remove()
            work, mark = job.work, read_mark(job.work.out)
            raise StageError(failure_message(work.label, state, message, work.rank_logs, list(job.log.unmarked), mark))
        job.record.remove()
        return True

    def _log_wait(self, job: Job, message: str) -> None:
        """Log why a job waits in Slurm's queue, each time the reason changes.

        Raises:
            StageError: the job could never start; it was cancelled.
        """
        state, _, reason = message.partition(" ")
        if state != "PENDING" or reason in ("", "None") or self._waits.get(job.record.token) == reason:
            return
        self._waits[job.record.token] = reason
        if reason in NEVER_STARTS:
            self.cancel(job)
            raise StageError(f"[{job.work.label}] can never start: {reason}: {NEVER_STARTS[reason]}")
        log_line(job.work.label, f"waits in the queue: {reason}")

    def cancel(self, job: Job) -> None:
        """Cancel a job and wait for its end; a job that cannot be cancelled is left, with its record."""
        job.log.stop()
        record = job.record
        if not record.has_lease():  # the job has ended or lost its lease
            return
        try:
            self._runner.cancel(record.handle)
        except Exception as error:
            log_line(record.label, f"{record.handle} could not be cancelled and may run on: {_first_line(error)}")
            return
        record.model_copy(update={"is_cancelled": True}).write()
        log_line(
            record.label,
            "cancelled" if self._wait_for_end(record) else f"{record.handle} was asked to end, and still runs",
        )

    def leave(self, job: Job) -> None:
        """Leave a job running; the next driver finds it, if the scheduler supports that."""
        scheduler = self._scheduler_of(job.record.scheduler)
        if isinstance(scheduler, Reattachable):
            scheduler.leave(job.record.handle.rpartition("/")[2])
        log_line(job.work.label, f"left running as {job.record.handle}; the same command follows it")

    def close(self) -> None:
        """End the jobs that this process started on this machine and did not leave."""
        self._runner.close()

    def _make_scheduler(self, name: str, session_name: str, **options: Any) -> Scheduler[Any]:
        self._schedulers[name] = FACTORIES[name](session_name, **options)
        return self._schedulers[name]

    def _scheduler_of(self, name: str) -> Scheduler[Any]:
        self._runner.scheduler_run_opts(name)  # makes it
        return self._schedulers[name]

    def _new_record(self, work: Work, app: AppDef) -> JobRecord:
        """Write the record of a job before its submission, and pass it the lease."""
        role = app.roles[0]
        log_dir = Path(str(self._options.get("log_dir", self._log_dir))).absolute()
        record = JobRecord(
            scheduler=self._scheduler, label=work.label, key=work.key, out=address(work.out), role=role.name,
            nodes=role.num_replicas, log_dir=str(log_dir),
        )  # fmt: skip
        record.write()
        # Doubled $: torchx substitutes single ones.
        role.env[lease.VARIABLE] = lease.lease_of(work.out, record.token).replace("$", "$$")
        return record

    def _submit(self, record: JobRecord, app: AppDef, submission: _Outage) -> str | None:
        """Submit a job and return its handle; None: it was not submitted; retry with another record.

        If a submission is not answered, the job is looked for. If it appears still later, its lease is gone by then.

        Raises:
            SchedulerError: the scheduler refused the job. UnansweredError: there was no answer for too long.
        """
        try:
            with warnings.catch_warnings(record=True) as warned:  # torchx only warns of a missing kubeconfig
                return str(self._runner.run(app, self._scheduler, self._options))
        except UnansweredError as error:
            submission.note(record.label, error)
            return self._find_with_retries(record)
        except Exception as error:
            record.remove()
            reasons = "; ".join([_first_line(error), *(_first_line(one.message) for one in warned)])
            raise SchedulerError(
                f"[{record.label}] run.scheduler {self._scheduler!r}: submitting the job failed: {reasons}"
            ) from error

    def _cancel_submission(self, record: JobRecord) -> None:
        """Cancel a job that may have been submitted."""
        with suppress(Exception):
            if handle := record.handle or self._find(record):
                self._runner.cancel(handle)
                log_line(record.label, f"{handle} was cancelled as it was submitted")

    def _find_with_retries(self, record: JobRecord) -> str | None:
        """Return the handle of the job with a record's token, once the scheduler answers; None if there is none."""
        return self._query(record.label, lambda: self._find(record), SchedulerError)

    def _find(self, record: JobRecord) -> str | None:
        scheduler = self._scheduler_of(record.scheduler)
        app_id = scheduler.find(record.token) if isinstance(scheduler, Reattachable) else None
        return None if app_id is None else f"{record.scheduler}://sidestack/{app_id}"

    def _status(self, record: JobRecord) -> AppStatus | None:
        """Return a job's state, once the scheduler answers; None if the job is unknown to it."""
        return self._query(record.label, lambda: self._runner.status(record.handle), Exception)

    def _query(self, label: str, ask: Callable[[], T], faults: type[Exception]) -> T:
        """Return the scheduler's answer; retry after errors of a given type.

        Raises:
            UnansweredError: there was no answer for too long.
        """
        while True:
            try:
                answer = ask()
            except faults as error:
                self._outage.note(label, error)
                time.sleep(_POLL_S)
                continue
            self._outage.end(label)
            return answer

    def _is_alive(self, status: AppStatus | None) -> bool:
        return status is not None and not status.is_terminal()

    def _wait_for_end(self, record: JobRecord) -> bool:
        """Wait for the end of a cancelled job, and remove its record; return False on timeout."""
        deadline = time.monotonic() + _ENDING_S
        while time.monotonic() < deadline:
            with suppress(Exception):
                if not self._is_alive(self._runner.status(record.handle)):
                    record.remove()
                    return True
            time.sleep(_POLL_S)
        return False

    def _follow(self, work: Work, record: JobRecord, is_new: bool) -> Job:
        log = JobLog(work.label)
        scheduler = self._scheduler_of(record.scheduler)
        if isinstance(scheduler, Reattachable):
            app_id = record.handle.rpartition("/")[2]
            log.follow_files(scheduler.log_files(app_id, record.role, record.nodes, Path(record.log_dir)), is_new)
        else:
            for node in range(record.nodes):
                since = None if is_new else datetime.now()
                log.follow(self._stream_lines(record, node, since))
        return Job(work, record, log, record.began + work.limit_s)

    def _stream_lines(self, record: JobRecord, node: int, since: datetime | None) -> Any:
        yield from self._runner.log_lines(record.handle, record.role, k=node, since=since, should_tail=True)


def _first_line(error: Warning | Exception | str) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, SchedulerError) else f"{type(error).__name__}: {text}"
