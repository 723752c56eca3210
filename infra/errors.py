"""The errors a user can cause. Each message names the value and the rule it breaks.

Invariants of our own code are `assert`s; whatever comes from outside (a config, a file, a directory, another
stage's output) ends in one of these, all of them `ValueError`s.
"""


class SidestackError(ValueError):
    """Base of every error that names something the user can mend."""


class ConfigError(SidestackError):
    """A configuration value, key or override breaks a rule."""


class DataError(SidestackError):
    """A table breaks its contract; the message names file, column, row group and rule."""


class CommitError(SidestackError):
    """A directory is not ours, not committed, already committed, or no longer fits its manifest."""


class AlreadyCommittedError(CommitError):
    """The directory is committed already: before the work began, or by another process meanwhile."""


class SpecError(SidestackError):
    """Semantic IDs of another spec or codebook than the one that was asked for."""


class StageError(SidestackError):
    """A stage failed on some rank, or a launched stage ended without success."""


class SchedulerError(StageError):
    """The scheduler refused a job, or what was asked of it."""


class UnansweredError(SchedulerError):
    """The scheduler could not be reached; what was asked of it may succeed later."""


class TrainingError(SidestackError):
    """A training went wrong in a way that more steps will not mend: collapsed digits, or ranks that drifted apart."""
