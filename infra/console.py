"""Where tables for people are printed."""

from rich.console import Console

FILE_WIDTH = 160


def wide_console(width: int = FILE_WIDTH) -> Console:
    """Return a console on stdout that cuts tables to the terminal; a file, which has no width, takes this one."""
    return Console(width=None if Console().is_terminal else width, highlight=False)
