"""What a stage says while it works, by the standard library's logging: on stderr, as stdout has a command's result.

Rank 0's lines of progress stand alone. Other ranks and other levels say where a line comes from:

    training: 4,096 of 16,384 (12 s)
    ranker: rank 1: warning: rank 1 has waited in 'reading events' for 31 s; ...
"""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress

from sidestack.infra.errors import ConfigError

LOG = logging.getLogger("sidestack")

LEVEL_VARIABLE = "SIDESTACK_LOG_LEVEL"
"""The least level that is shown, by its name."""
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def set_up(stage: str, rank: int = 0, environment: Mapping[str, str] = os.environ) -> None:
    """Have this process's lines carry its stage and rank, from the level on that the environment names.

    Raises:
        ConfigError: there is no such level.
    """
    level = environment.get(LEVEL_VARIABLE, "INFO")
    HANDLER.setFormatter(_Origin(f"{stage}: rank {rank}: ", rank))
    if level not in _LEVELS:
        raise ConfigError(f"{LEVEL_VARIABLE}={level!r}: must be one of {', '.join(_LEVELS)}")
    LOG.setLevel(level)


class _Origin(logging.Formatter):
    """Puts stage, rank and level before a message, but for rank 0's lines of progress."""

    def __init__(self, origin: str = "", rank: int = 0) -> None:
        super().__init__()
        self._origin, self._rank = origin, rank

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno == logging.INFO:
            return message if self._rank == 0 else f"{self._origin}{message}"
        return f"{self._origin}{record.levelname.lower()}: {message}"


class _Stderr(logging.Handler):
    """Prints on what is stderr at the time. A terminal that is gone is no error."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


# Before `set_up` too, and in a driver, lines are printed: without an origin.
HANDLER = _Stderr()
HANDLER.setFormatter(_Origin())
LOG.addHandler(HANDLER)
LOG.setLevel(logging.INFO)
LOG.propagate = False  # libraries that we import set the root up for themselves
