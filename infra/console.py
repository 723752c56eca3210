"""Where tables for people are printed."""

import io
import sys

from rich.console import Console

FILE_WIDTH = 160


def replace_unencodable() -> None:
    """Let stdout replace characters that its encoding lacks: a result must not be lost for want of a character."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def wide_console(width: int = FILE_WIDTH) -> Console:
    """Return a console on stdout that cuts tables to the terminal; a file, which has no width, takes this one."""
    replace_unencodable()
    return Console(width=None if Console().is_terminal else width, highlight=False)
