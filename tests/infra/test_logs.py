"""Lines of a stage's log: what rank 0 says stands alone, all else says where it comes from, and levels hide lines."""

import contextlib
import io
import subprocess
import sys

import pytest

from sidestack.infra.errors import ConfigError
from sidestack.infra.logs import LEVEL_VARIABLE, LOG, set_up


def lines(rank: int, **environment: str) -> list[str]:
    """Return what a rank says of each level."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        set_up("ranker", rank, environment)
        LOG.debug("opening")
        LOG.info("100% read")
        LOG.warning("waits")
        LOG.error("ends")
    return said.getvalue().splitlines()


def test_rank_0_says_its_progress_alone_and_all_else_where_it_is_from() -> None:
    assert lines(0) == ["100% read", "ranker: rank 0: warning: waits", "ranker: rank 0: error: ends"]
    assert lines(3) == ["ranker: rank 3: 100% read", "ranker: rank 3: warning: waits", "ranker: rank 3: error: ends"]


def test_a_level_hides_those_below_it() -> None:
    assert lines(0, **{LEVEL_VARIABLE: "ERROR"}) == ["ranker: rank 0: error: ends"]
    assert lines(1, **{LEVEL_VARIABLE: "DEBUG"})[0] == "ranker: rank 1: debug: opening"
    with pytest.raises(ConfigError, match=r"SIDESTACK_LOG_LEVEL='loud': must be one of DEBUG, INFO, WARNING, ERROR"):
        set_up("ranker", 0, {LEVEL_VARIABLE: "loud"})


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    closed = io.StringIO()
    closed.close()
    with contextlib.redirect_stderr(closed):
        LOG.error("nobody reads it")


def test_a_process_that_set_nothing_up_prints_lines_once_whatever_libraries_do_with_the_root() -> None:
    program = (
        "import logging; logging.basicConfig(); from sidestack.infra.logs import LOG; LOG.info('a'); LOG.warning('b')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "a\nwarning: b\n")
