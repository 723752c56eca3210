"""The errors a user can cause. Each message names the value and the rule it breaks.

Invariants of our own code are `assert`s. Faults in outside data (a config, a file, a directory, another stage's
output) raise one of these, all of them `ValueError`s.
"""

import reprlib


class SidestackError(ValueError):
    """Base of every error that names something the user can fix."""


class ConfigError(SidestackError):
    """A configuration value, key or override breaks a rule."""


class AddressError(SidestackError):
    """A path looks like a URL but cannot be used as one, or is a URL where a local path is required."""


class RemoteError(SidestackError):
    """An object store cannot be reached, or refuses a request; the message names the URL and what to do."""


class DataError(SidestackError):
    """A table breaks its contract; the message names file, column, row group and rule."""


class CommitError(SidestackError):
    """A directory is not ours, not committed, already committed, or no longer matches its manifest."""


class AlreadyCommittedError(CommitError):
    """The directory is committed already: before the work began, or by another process meanwhile."""


class SpecError(SidestackError):
    """Semantic IDs have another spec or codebook than the requested one."""


class StageError(SidestackError):
    """A stage failed on some rank, or a launched stage ended without success."""


class SchedulerError(StageError):
    """The scheduler refused a job, or another request."""


class UnansweredError(SchedulerError):
    """The scheduler could not be reached; the request may succeed later."""


class TrainingError(SidestackError):
    """A training failed in a way that more steps will not fix: collapsed digits, or ranks that diverged."""


class StalledError(SidestackError):
    """A rank made no progress for longer than the collective timeout."""


class PreemptedError(SidestackError):
    """A stage was asked to stop by a signal, and stopped.

    Attributes:
        signal: its name; None: another rank got it. step: the saved step, from which the stage resumes; None: none.
    """

    def __init__(self, signal: str | None, step: int | None = None) -> None:
        self.signal = signal
        self.step = step
        at = "" if step is None else f" at step {step}"
        by = "another rank was asked to stop" if signal is None else f"{signal} asked it to stop"
        super().__init__(f"preempted{at} ({by}); start it again to resume")


def short(value: object, length: int = 40) -> str:
    """Format a value for messages, in at most `length` characters and in a time that does not depend on its size."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxlong = shown.maxother = shown.maxlist = shown.maxdict = length
    try:
        text = shown.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."
