"""Names and values inside SQL text."""

from collections.abc import Sequence
from pathlib import Path


def quoted(name: str) -> str:
    """Return a column's or table's name as an SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def literal(text: str) -> str:
    """Return text as an SQL literal."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def file_list(files: Sequence[Path]) -> str:
    """Return file names as an SQL list."""
    return f"[{', '.join(literal(str(file)) for file in files)}]"


def interval(days: float) -> str:
    """Return a length of time in days as an SQL literal."""
    return f"INTERVAL {round(days * 86_400_000_000)} MICROSECOND"


def matching(left: str, right: str, columns: Sequence[str]) -> str:
    """Return the condition that two tables have the same values in some columns."""
    return " AND ".join(f"{left}.{column} = {right}.{column}" for column in columns)
