"""The description of a partition in a snapshot, and the lists of partitions that snapshots share.

Lists are stored beside the partitions. Each covers one table, and one month of dates or a hundred parts. Its file is
named by the digest of its content. So a snapshot that names lists by digest fixes every partition, and an added day
writes only the lists of its month.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import NonNegativeInt

from sidestack.infra.config import Config, Inside, matching, parse
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.files import write_whole
from sidestack.infra.manifest import Manifest
from sidestack.infra.remote.copies import read_bytes
from sidestack.infra.tables import parse_json

LISTS = "lists"
"""The folder of the lists, in the store."""


ListDigest = Annotated[str, matching("[0-9a-f]{64}", "a SHA-256 in hexadecimal digits")]
"""The name of a file in `lists/`."""


class PartitionFile(Config):
    """One Parquet file of a partition."""

    name: Inside
    rows: NonNegativeInt


class PartitionEntry(Config):
    """One partition, as a snapshot lists it."""

    table: str
    """`items`, `users`, `requests`, `events` or `labels`; for SID columns `sids/<set>/<generation>/<table>`."""
    slice: str
    """Which part of the table: `date=2024-01-31`, or `part=00003`."""
    path: Inside
    """Its directory, relative to the store."""
    digest: str
    """Digest of its manifest, over names and contents of its files."""
    columns: str
    """Digest of the names and types of its columns."""
    files: tuple[PartitionFile, ...]
    """Its Parquet files, in order."""
    facts: dict[str, int] = {}
    """Numbers that readers need without opening the files: `first` and `new` of parts, `max_item_id` of dates."""

    @property
    def rows(self) -> int:
        """Number of rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def date(self) -> date:
        """The date of its rows.

        Raises:
            DataError: it is not the partition of a date.
        """
        return slice_date(self.slice, self.path)


def date_slice(day: date) -> str:
    """Return the name of a date's slice."""
    return f"date={day.isoformat()}"


def part_slice(number: int) -> str:
    """Return the slice name of a part of the items or users; parts are numbered from 0."""
    return f"part={number:05d}"


def slice_date(name: str, where: object) -> date:
    """Return the date of a slice or folder named `date=YYYY-MM-DD`.

    Raises:
        DataError: it has another name.
    """
    try:
        return date.fromisoformat(name.removeprefix("date=")) if name.startswith("date=") else _refuse_date(where)
    except ValueError:
        return _refuse_date(where)


def _refuse_date(where: object) -> date:
    raise DataError(f"{where}: must lie in a folder named date=YYYY-MM-DD")


def entry_of(table: str, slice_name: str, path: str, manifest: Manifest) -> PartitionEntry:
    """Describe a committed partition by its manifest, without reading its files; `path` is relative to the store."""
    files = sorted((name, entry.rows) for name, entry in manifest.files.items() if name.endswith(".parquet"))
    return PartitionEntry(
        table=table,
        slice=slice_name,
        path=path,
        digest=manifest.digest,
        columns=manifest.facts["columns"],
        files=tuple(PartitionFile(name=name, rows=rows or 0) for name, rows in files),
        facts=manifest.facts["numbers"],
    )


def by_table(entries: Iterable[PartitionEntry]) -> dict[str, list[PartitionEntry]]:
    """Group partitions by table, in the order given."""
    tables: dict[str, list[PartitionEntry]] = {}
    for entry in entries:
        tables.setdefault(entry.table, []).append(entry)
    return tables


class PartitionList(Config):
    """The content of one file in `lists/`."""

    partitions: tuple[PartitionEntry, ...]


def write_lists(store: Path, entries: Iterable[PartitionEntry]) -> dict[str, tuple[str, ...]]:
    """Write the lists that the store lacks; return the digests of all lists by table, in order.

    Args:
        store: the store's directory. entries: the partitions, ascending within each table.
    """
    return {
        table: tuple(_write_list(store, list(group)) for _, group in itertools.groupby(own, _span))
        for table, own in by_table(entries).items()
    }


def _span(entry: PartitionEntry) -> str:
    """Return the list that a partition belongs to: the month of its date, or the hundred of its part number."""
    month, _, _ = entry.slice.rpartition("-")
    return month or entry.slice[:-2]


def _write_list(store: Path, entries: Sequence[PartitionEntry]) -> str:
    content = PartitionList(partitions=tuple(entries)).model_dump_json().encode()
    digest = hashlib.sha256(content).hexdigest()
    file = list_file(store, digest)
    if _bytes_of(file) != content:
        write_whole(file, content)
    return digest


def _bytes_of(file: Path) -> bytes | None:
    try:
        return read_bytes(file)
    except FileNotFoundError:
        return None


def read_lists(store: Path, lists: Mapping[str, Sequence[str]]) -> tuple[PartitionEntry, ...]:
    """Return the partitions in some lists, in order.

    Args:
        store: the store's directory. lists: digests by table.

    Raises:
        CommitError: a list is missing or was altered. ConfigError: a path in it leads out of the store.
    """
    return tuple(entry for digests in lists.values() for digest in digests for entry in _read_list(store, digest))


def _read_list(store: Path, digest: str) -> Sequence[PartitionEntry]:
    file = list_file(store, digest)
    try:
        content = read_bytes(file)
    except OSError as error:
        raise CommitError(f"{file}: a list of partitions cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CommitError(f"{file}: a list of partitions is not of the digest in its name: the file was altered")
    return parse(PartitionList, parse_json(content, str(file)), str(file)).partitions


def list_file(store: Path, digest: str) -> Path:
    """Return the file of the list with a digest."""
    return store / LISTS / f"{digest}.json"
