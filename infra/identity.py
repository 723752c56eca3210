"""The identity of files that others wrote, without reading them whole: name, size and Parquet footer.

A footer holds the sizes and statistics of every column of every row group, so changed rows nearly always change it. A
full SHA-256 is an option where that is not enough. A cache holds each file's identity with its size and modification
time, so that an unchanged file is not opened again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sidestack.infra.errors import DataError
from sidestack.infra.files import write_whole

Identify = Literal["footer", "sha256"]
"""What identifies a file: its size and Parquet footer, or all its bytes."""

_TAIL = 8
"""Bytes after a Parquet footer: its length, and the magic number."""


@dataclass(frozen=True)
class IdentityCache:
    """The identities of files as last seen, in a JSON file; losing it only costs time.

    Attributes:
        path: the JSON file; it need not exist.
    """

    path: Path

    def identities(self, files: Iterable[Path], identify: Identify = "footer") -> dict[Path, str]:
        """Return the identity of each file; a file that is not named `.parquet` is identified by all its bytes.

        Raises:
            DataError: a file cannot be read, or is named `.parquet` but is not a Parquet file.
        """
        wanted = list(files)
        if identify == "sha256":
            with ThreadPoolExecutor(4) as pool:
                return dict(zip(wanted, pool.map(_sha256, wanted), strict=True))
        known = self._read()
        marks = {file: _mark(file) for file in wanted}
        found = {file: known[str(file)][1] for file, mark in marks.items() if known.get(str(file), [None])[0] == mark}
        new = [file for file in wanted if file not in found]
        if new:
            with ThreadPoolExecutor(8) as pool:
                found |= dict(zip(new, pool.map(_identity, new), strict=True))
            self._write({**known, **{str(file): [marks[file], found[file]] for file in new}})
        return {file: found[file] for file in wanted}

    def _read(self) -> dict[str, list[str]]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write(self, values: Mapping[str, list[str]]) -> None:
        write_whole(self.path, json.dumps(values, indent=0).encode())


def _mark(file: Path) -> str:
    """Return a text that changes when a file is written to: size, modification time and inode."""
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _identity(file: Path) -> str:
    return _footer_digest(file) if file.suffix == ".parquet" else _sha256(file)


def _footer_digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - _TAIL, 0))
            tail = opened.read()
            length = int.from_bytes(tail[:4], "little")
            if len(tail) < _TAIL or tail[4:] != b"PAR1" or length > size - _TAIL:
                raise DataError(f"{file}: is no Parquet file: it does not end in a footer")
            opened.seek(size - _TAIL - length)
            return f"{size}-{hashlib.sha256(opened.read()).hexdigest()}"
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
