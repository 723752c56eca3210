"""Ids of items and users: numbered in order of arrival, in parts that are stored and never change.

A key's id depends on when it arrived, so the parts are the record and not a cache: a key keeps its id as long as the
store exists. A part has first the known keys whose content in the catalogue changed, then the new keys in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import duckdb

from sidestack.infra.code import code_digest
from sidestack.infra.config import digest
from sidestack.infra.errors import DataError
from sidestack.infra.partitions import PartitionEntry, part_slice
from sidestack.infra.sql import file_list, literal, quoted
from sidestack.infra.store import Store
from sidestack.infra.tables import Entity
from sidestack.pipelines.prepare.log.ingest import RawPart, write_query

CODE = ("pipelines/prepare/log/numbering.py",)
NO_NUMBERS = "SELECT '' AS key, 0::BIGINT AS id, 0::UBIGINT AS content WHERE false"


@dataclass(frozen=True)
class Numbering:
    """The ids of the items or of the users.

    Attributes:
        store: of its parts. entity: items or users. settings: digest of the content columns.
        columns: names of ingested content columns.
    """

    store: Store
    entity: Entity
    settings: str
    columns: Sequence[str]

    @property
    def table(self) -> str:
        """The table of the parts, in the store."""
        return f"raw/{self.entity}_numbers"

    def parts(self, end: date) -> list[PartitionEntry]:
        """Return the parts that were made for log ends up to a date, in order."""
        found: list[PartitionEntry] = []
        while (entry := self._find(len(found))) is not None and entry.facts["end"] <= end.toordinal():
            found.append(entry)
        return found

    def files(self, end: date) -> list[Path]:
        """Return the files of `parts`."""
        return [self.store.file(entry) for entry in self.parts(end)]

    def update(
        self, database: duckdb.DuckDBPyConnection, catalogue: Sequence[RawPart], seen: Sequence[RawPart], end: date
    ) -> None:
        """Write a part for what is new before a date: keys of the catalogue and of events, and changed content.

        Args:
            database: a connection. catalogue: its files, newest last. seen: events. end: the log's end, exclusive.

        Raises:
            DataError: one file has two contents for a key; or keys of this log were first numbered for a later log end,
                so that their ids do not fit the earlier one.
        """
        self._load(database, catalogue, seen, end)
        known = self.parts(end)
        first = sum(part.facts["new"] for part in known)
        number = len(known)
        new, revised = _counts(database)
        if not new + revised:
            return
        if (later := self._find(number)) is not None:
            raise DataError(
                f"prepare.as_of: the log until {end} has {new:,} {self.entity}s that were numbered when it was read"
                f" until {date.fromordinal(later.facts['end'])}; an earlier snapshot needs a run.name of its own"
            )
        with self.store.new_partition(self.table, part_slice(number), self._key(number)) as made:
            write_query(database, self._rows(first), made)
            made.numbers |= {"first": first, "new": new, "end": end.toordinal()}

    def _find(self, number: int) -> PartitionEntry | None:
        return self.store.find(self.table, part_slice(number), self._key(number))

    def _key(self, number: int) -> str:
        return digest({"numbers": self.entity, "number": number, "of": self.settings, "code": code_digest(CODE)})

    def _load(
        self, database: duckdb.DuckDBPyConnection, catalogue: Sequence[RawPart], seen: Sequence[RawPart], end: date
    ) -> None:
        """Load tables `known` (key, id, content), `listed` (key, content columns, content) and `keys` (key)."""
        key, columns = f"{self.entity}_key", "".join(f", {quoted(name)}" for name in self.columns)
        files = self.files(end)
        known = NO_NUMBERS
        if files:
            rows = f"read_parquet({file_list(files)}, filename = true)"
            known = f"SELECT key, id, arg_max(content, filename) AS content FROM {rows} GROUP BY key, id"
        database.execute(f"CREATE OR REPLACE TEMP TABLE known AS {known}")
        _load_catalogue(database, catalogue, self.store, key, columns, self.entity)
        keys = "SELECT key FROM listed"
        paths = [part for part in seen if any(day < end for day in part.days)]
        if paths:
            rows = f"read_parquet({file_list(files_of(self.store, paths))})"
            keys += f" UNION SELECT {key} FROM {rows} WHERE event_time < TIMESTAMP '{end}'"
        database.execute(f"CREATE OR REPLACE TEMP TABLE keys AS {keys}")

    def _rows(self, first: int) -> str:
        """Return the query of a part's rows: revised rows by id, then new rows by key."""
        columns = "".join(f", {quoted(name)}" for name in self.columns)
        return f"""
            SELECT id, key{columns}, content, content IS NOT NULL AS is_listed FROM (
                SELECT known.id, listed.* FROM known JOIN listed USING (key)
                WHERE listed.content IS DISTINCT FROM known.content
                UNION ALL BY NAME
                SELECT {first} + row_number() OVER (ORDER BY key) - 1 AS id, key, listed.* EXCLUDE (key)
                FROM keys LEFT JOIN listed USING (key) WHERE key NOT IN (SELECT key FROM known)
            ) ORDER BY id"""


def _load_catalogue(
    database: duckdb.DuckDBPyConnection,
    catalogue: Sequence[RawPart],
    store: Store,
    key: str,
    columns: str,
    entity: Entity,
) -> None:
    """Load table `listed`: each key once, from the newest file that has it."""
    if not catalogue:
        database.execute(f"CREATE OR REPLACE TEMP TABLE listed AS SELECT key, content FROM ({NO_NUMBERS})")
        return
    parts = " UNION ALL ".join(
        f"SELECT DISTINCT {place} AS file, {key} AS key{columns}, hash(0{columns}) AS content"
        f" FROM read_parquet({literal(str(path))})"
        for place, path in enumerate(files_of(store, catalogue))
    )
    database.execute(f"CREATE OR REPLACE TEMP TABLE catalogue AS {parts}")
    twice = database.execute(
        "SELECT file, key, count(*) FROM catalogue GROUP BY file, key HAVING count(*) > 1 ORDER BY file, key"
    ).fetchall()
    if twice:
        file, name, count = twice[0]
        raise DataError(
            f"{catalogue[file].origin}: {len(twice):,} {entity}s have several contents; {name!r} has {count}"
        )
    database.execute(
        "CREATE OR REPLACE TEMP TABLE listed AS SELECT * EXCLUDE (file) FROM catalogue"
        " QUALIFY row_number() OVER (PARTITION BY key ORDER BY file DESC) = 1"
    )


def _counts(database: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Return the number of new keys, and of known keys with changed content."""
    found = database.execute(
        "SELECT (SELECT count(*) FROM keys WHERE key NOT IN (SELECT key FROM known)),"
        " (SELECT count(*) FROM known JOIN listed USING (key) WHERE listed.content IS DISTINCT FROM known.content)"
    ).fetchall()[0]
    return found[0], found[1]


def files_of(store: Store, parts: Sequence[RawPart]) -> list[Path]:
    """Return the files of ingested parts."""
    return [store.file(part.entry) for part in parts]


def create_once(
    store: Store, database: duckdb.DuckDBPyConnection, name: str, settings: Mapping[str, object], query: str
) -> Path:
    """Return the file of a list (a vocabulary) that is made once, from the rows at that time, and then kept.

    Args:
        store: of the list. database: a connection. name: of the list. settings: what decides it, besides rows.
        query: of its rows.
    """
    table, part, work = "raw/vocabularies", part_slice(0), digest({"list": name, **settings})
    if store.find(f"{table}/{name}", part, work) is None:
        with store.new_partition(f"{table}/{name}", part, work) as made:
            write_query(database, query, made)
    return store.file(store.entry(f"{table}/{name}", part, work))
