"""Logging of a stage, by the standard library's logging: to stderr, because stdout is for a command's result.

Rank 0's progress lines have no prefix. Lines of other ranks and other levels begin with their origin:

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
"""The environment variable with the name of the lowest level that is shown."""
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def set_up(stage: str, rank: int = 0, environment: Mapping[str, str] = os.environ) -> None:
    """Set up this process's log lines with its stage and rank, and the level that the environment names.

    Raises:
        ConfigError: there is no such level.
    """
    level = environment.get(LEVEL_VARIABLE, "INFO")
    HANDLER.setFormatter(_Origin(f"{stage}: rank {rank}: ", rank))
    if level not in _LEVELS:
        raise ConfigError(f"{LEVEL_VARIABLE}={level!r}: must be one of {', '.join(_LEVELS)}")
    LOG.setLevel(level)


class _Origin(logging.Formatter):
    """A formatter that prefixes stage, rank and level, except for rank 0's progress lines."""

    def __init__(self, origin: str = "", rank: int = 0) -> None:
        super().__init__()
        self._origin, self._rank = origin, rank

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        if record.levelno == logging.INFO:
            return message if self._rank == 0 else f"{self._origin}{message}"
        return f"{self._origin}{record.levelname.lower()}: {message}"


class _Stderr(logging.Handler):
    """A handler that prints to the current `sys.stderr`; a closed terminal is not an error."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


# Before `set_up`, and in a driver, lines are printed without an origin.
HANDLER = _Stderr()
HANDLER.setFormatter(_Origin())
LOG.addHandler(HANDLER)
LOG.setLevel(logging.INFO)
LOG.propagate = False  # imported libraries configure the root logger
