"""Consoles for printed tables."""

import io
import sys

from rich.console import Console

FILE_WIDTH = 160


def replace_unencodable() -> None:
    """Let stdout replace characters that its encoding lacks, so that no result is lost to an encoding error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def wide_console(width: int = FILE_WIDTH) -> Console:
    """Return a console on stdout that fits tables to the terminal; `width` applies to files, which have none."""
    replace_unencodable()
    return Console(width=None if Console().is_terminal else width, highlight=False)
