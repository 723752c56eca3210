"""Lines of a stage's log: rank 0's progress has no prefix, other lines name stage and rank, and levels hide lines."""

import contextlib
import io
import subprocess
import sys

import pytest

from sidestack.infra.errors import ConfigError
from sidestack.infra.logs import LEVEL_VARIABLE, LOG, set_up


def lines(rank: int, **environment: str) -> list[str]:
    """Return the lines of a rank that logs one message per level."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        set_up("ranker", rank, environment)
        LOG.debug("opening")
        LOG.info("100% read")
        LOG.warning("waits")
        LOG.error("ends")
    return output.getvalue().splitlines()


def test_lines_are_prefixed_by_stage_and_rank_except_progress_of_rank_0() -> None:
    assert lines(0) == ["100% read", "ranker: rank 0: warning: waits", "ranker: rank 0: error: ends"]
    assert lines(3) == ["ranker: rank 3: 100% read", "ranker: rank 3: warning: waits", "ranker: rank 3: error: ends"]


def test_log_level_hides_lower_levels() -> None:
    assert lines(0, **{LEVEL_VARIABLE: "ERROR"}) == ["ranker: rank 0: error: ends"]
    assert lines(1, **{LEVEL_VARIABLE: "DEBUG"})[0] == "ranker: rank 1: debug: opening"
    with pytest.raises(ConfigError, match=r"SIDESTACK_LOG_LEVEL='loud': must be one of DEBUG, INFO, WARNING, ERROR"):
        set_up("ranker", 0, {LEVEL_VARIABLE: "loud"})


def test_closed_stderr_raises_no_error() -> None:
    closed = io.StringIO()
    closed.close()
    with contextlib.redirect_stderr(closed):
        LOG.error("nobody reads it")


def test_lines_are_printed_once_without_set_up_and_with_a_configured_root_logger() -> None:
    program = (
        "import logging; logging.basicConfig(); from sidestack.infra.logs import LOG; LOG.info('a'); LOG.warning('b')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "a\nwarning: b\n")
