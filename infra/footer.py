"""A checksum for the footer of a Parquet file.

Parquet has checksums of pages but none of the footer. The footer holds the offsets, columns and types of the pages, and
the SIDs' specs. The checksum is stored just before the footer, where the format allows other bytes: readers find pages
by their offsets from the front, and the footer by its length from the end.
"""

import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidestack.infra.errors import DataError

_CHECKSUM = struct.Struct("<8sI")
"""Our mark, and the CRC-32 of the footer including its length and its closing mark."""
_MARK = b"SIDSTACK"
_END = struct.Struct("<I4s")
"""A Parquet file's last bytes: the footer's length, and the format's mark."""
_PARQUET = b"PAR1"


def with_checksum(footer: bytes) -> bytes:
    """Return a footer with its checksum before it.

    Args:
        footer: all bytes that a Parquet writer writes when it closes, up to the file's last byte.
    """
    length, mark = _END.unpack(footer[-_END.size :])
    assert mark == _PARQUET and length + _END.size == len(footer)
    return _CHECKSUM.pack(_MARK, zlib.crc32(footer)) + footer


def read_footer(path: Path) -> pq.FileMetaData:
    """Read a Parquet file's footer and verify its checksum; files of other writers have none.

    Raises:
        DataError: the file is missing, truncated or not Parquet, or its footer was altered.
    """
    try:
        checksum, footer = _last_bytes(Path(path))
        found = pq.read_metadata(pa.BufferReader(footer))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    if checksum.startswith(_MARK) and checksum != with_checksum(footer)[: _CHECKSUM.size]:
        raise DataError(f"{path}: the footer is not of its checksum: the file was altered")
    return found


def _last_bytes(path: Path) -> tuple[bytes, bytes]:
    """Return the bytes at the checksum's place before the footer, and the footer up to the file's last byte.

    Raises:
        OSError: the file cannot be read. ValueError: it does not end like a Parquet file.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size))
        end = file.read()
        length, mark = _END.unpack(end) if len(end) == _END.size else (0, b"")
        begin = size - _END.size - length
        if mark != _PARQUET or begin < len(_PARQUET):
            raise ValueError(f"it does not end as Parquet does ({size} bytes)")
        before = max(0, begin - _CHECKSUM.size)
        file.seek(before)
        read = file.read()
    return read[: begin - before], read[begin - before :]
