"""The files of a raw log, and how DuckDB reads a file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from sidestack.infra.errors import DataError
from sidestack.infra.identity import IdentityCache
from sidestack.infra.remote.urls import local_path
from sidestack.infra.sql import literal
from sidestack.pipelines.prepare.log.config import LogConfig

SUFFIXES = (".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst")
"""Suffixes of data files in a folder; a file that is given by path or glob may have any name."""
EVENTS, ITEMS, USERS = "events", "items", "users"


@dataclass(frozen=True)
class RawFiles:
    """The files of a log.

    Attributes:
        tables: `events`, `items`, `users`, `labels.<name>` -> its files. identity: of each file, without its name.
    """

    tables: Mapping[str, Sequence[Path]]
    identity: Mapping[Path, str]


def raw_files(config: LogConfig, identity_cache: Path) -> RawFiles:
    """Find and identify all files.

    Raises:
        DataError: lists all faults: a path without a file, two equal files, or a file that cannot be read.
    """
    faults: list[str] = []
    tables: dict[str, Sequence[Path]] = {}
    for name, paths in paths_of(config).items():
        tables[name] = list(_found(name, paths, faults))
    if faults:
        raise DataError("\n".join(faults))
    identity = IdentityCache(identity_cache).identities(
        [file for files in tables.values() for file in files], config.identify
    )
    for name, files in tables.items():
        faults += _copies(name, files, identity)
    if faults:
        raise DataError("\n".join(faults))
    return RawFiles(tables, identity)


def paths_of(config: LogConfig) -> dict[str, Sequence[str]]:
    """Return the paths of each table, as configured."""
    found: dict[str, Sequence[str]] = {EVENTS: config.events.path}
    if config.items is not None:
        found[ITEMS] = config.items.path
    if config.users is not None:
        found[USERS] = config.users.path
    return {**found, **{f"labels.{name}": one.path for name, one in config.labels.items()}}


def _found(name: str, paths: Sequence[str], faults: list[str]) -> Iterator[Path]:
    for path in paths:
        files = sorted(_files(path))
        if not files:
            faults.append(f"prepare.source.{name}.path: {path}: no data file is there")
        yield from files


def _files(path: str) -> Iterator[Path]:
    """Yield a path's data files, without empty and hidden ones (a name below the path begins with `_` or `.`)."""
    given = local_path(path)
    if given.is_file():
        yield from [given] if given.stat().st_size else []
        return
    base, pattern = _split_glob(given)
    for file in base.glob(pattern or "**/*"):
        is_data = bool(pattern) or file.name.endswith(SUFFIXES)
        is_hidden = any(part.startswith(("_", ".")) for part in file.relative_to(base).parts)
        if is_data and not is_hidden and file.is_file() and file.stat().st_size:
            yield file


def _split_glob(path: Path) -> tuple[Path, str]:
    """Return a path's folder before the first wildcard, and the rest."""
    parts = path.parts
    first = next((number for number, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return Path(*parts[:first]), "/".join(parts[first:])


def _copies(name: str, files: Sequence[Path], identity: Mapping[Path, str]) -> Iterator[str]:
    firsts: dict[str, Path] = {}
    for file in files:
        first = firsts.setdefault(identity[file], file)
        if first != file:
            yield f"prepare.source.{name}.path: {file}: is the same file as {first}; remove one of them"


@dataclass(frozen=True)
class Relation:
    """One file as DuckDB reads it.

    Attributes:
        sql: the table function's call. types: column -> DuckDB's type.
    """

    sql: str
    types: Mapping[str, str]


def relation(database: duckdb.DuckDBPyConnection, file: Path, texts: Sequence[str]) -> Relation:
    """Return how a file is read; folder names such as `date=2024-03-01` become columns.

    Args:
        database: a connection. file: Parquet, or else CSV of any delimiter.
        texts: columns of a CSV to read as text in any case, such as ids, which may have leading zeros.

    Raises:
        DataError: the file cannot be read.
    """
    name = literal(str(file))
    if file.suffix == ".parquet":
        return Relation(call := f"read_parquet({name}, hive_partitioning = true)", _types(database, call, file))
    guess = f"read_csv({name}, sample_size = -1, hive_partitioning = true)"
    guessed = _types(database, guess, file)
    known = [column for column in texts if column in guessed]
    if not known:
        return Relation(guess, guessed)
    types = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in dict.fromkeys(known))
    call = f"read_csv({name}, sample_size = -1, hive_partitioning = true, types = {{{types}}})"
    return Relation(call, _types(database, call, file))


def _types(database: duckdb.DuckDBPyConnection, call: str, file: Path) -> dict[str, str]:
    try:
        rows = database.execute(f"DESCRIBE SELECT * FROM {call}").fetchall()
    except duckdb.Error as error:
        raise DataError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
    return {name: kind for name, kind, *_ in rows}
