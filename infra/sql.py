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
    """Return files as an SQL list."""
    return f"[{', '.join(literal(str(file)) for file in files)}]"
