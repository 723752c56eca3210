"""A first configuration for a folder of raw files, guessed from column names, types and a sample of rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import yaml

from sidestack.infra.errors import DataError
from sidestack.infra.sql import literal, quoted
from sidestack.pipelines.prepare.log.files import SUFFIXES, relation

USER_NAMES = ("user", "uid", "customer", "member", "visitor", "household", "viewer", "account", "reader")
ITEM_NAMES = (
    "item", "sku", "product", "movie", "article", "video", "song", "book", "game", "app", "ad_id", "asin", "iid",
)  # fmt: skip
TIME_NAMES = ("time", "ts", "date", "timestamp", "at", "when")
LABEL_NAMES = (
    "click", "clicked", "like", "liked", "purchase", "purchased", "bought", "converted", "conversion", "label",
    "watched",
)  # fmt: skip
ACTION_NAMES = ("action", "event", "event_type", "type", "kind")
RATING_NAMES = ("rating", "stars", "score")
TEXT_WORDS = 2.0
"""A column whose values have at least this many words on average counts as text."""
FEW_VALUES = 1000
ROWS = 50_000
"""Maximum number of rows that are read of each table."""


@dataclass(frozen=True)
class Column:
    """A column, as sampled rows show it.

    Attributes:
        kind: DuckDB's type. distinct: number of distinct values. words: mean words of a value.
        values: the most frequent values, if the column has few distinct ones.
    """

    name: str
    kind: str
    distinct: int
    words: float
    values: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Files of one layout.

    Attributes:
        path: the folder, or the one file. columns: by name. rows: number sampled. bytes: of all files.
    """

    path: Path
    columns: Mapping[str, Column]
    rows: int
    bytes: int


def tables_in(folder: Path, database: duckdb.DuckDBPyConnection) -> list[Table]:
    """Return the tables of a folder: each data file in it, and each subfolder that has data files.

    Raises:
        DataError: there is no table, or a file cannot be read.
    """
    found = []
    for place in sorted(folder.iterdir() if folder.is_dir() else []):
        if place.name.startswith(("_", ".")):
            continue
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        data = [file for file in files if place.is_file() or file.name.endswith(SUFFIXES)]
        data = [file for file in data if file.stat().st_size and not file.name.startswith(("_", "."))]
        if data:
            found.append(_table(place, data, database))
    if not found:
        raise DataError(f"{folder}: no data file is there")
    return found


def _table(place: Path, files: Sequence[Path], database: duckdb.DuckDBPyConnection) -> Table:
    read = relation(database, files[0], ())
    database.execute(f"CREATE OR REPLACE TEMP TABLE looked_at AS SELECT * FROM {read.sql} LIMIT {ROWS}")
    rows = database.execute("SELECT count(*) FROM looked_at").fetchall()[0][0]
    columns = {name: _column(name, kind, database) for name, kind in read.types.items()}
    return Table(place, columns, rows, sum(file.stat().st_size for file in files))


def _column(name: str, kind: str, database: duckdb.DuckDBPyConnection) -> Column:
    column = quoted(name)
    words = f"avg(len(string_split(trim(CAST({column} AS VARCHAR)), ' ')))" if kind == "VARCHAR" else "0"
    distinct, mean = database.execute(f"SELECT count(DISTINCT {column}), {words} FROM looked_at").fetchall()[0]
    values: tuple[str, ...] = ()
    if distinct <= 20 and not kind.endswith("]"):
        rows = database.execute(
            f"SELECT CAST({column} AS VARCHAR) AS value FROM looked_at WHERE {column} IS NOT NULL GROUP BY value"
            " ORDER BY count(*) DESC, value"
        ).fetchall()
        values = tuple(value for (value,) in rows)
    return Column(name, kind, distinct, float(mean or 0), values)


def guess_config(tables: Sequence[Table], name: str) -> dict[str, Any]:
    """Return a configuration for the tables.

    Raises:
        DataError: no table has a user, an item and a time.
    """
    events = max((table for table in tables if _is_events(table)), key=lambda table: table.bytes, default=None)
    if events is None:
        seen = "; ".join(f"{table.path.name}: {', '.join(table.columns)}" for table in tables)
        raise DataError(f"no table has a user, an item and a time by the names of its columns ({seen})")
    user, item, at = (_find_column(events, names) for names in (USER_NAMES, ITEM_NAMES, TIME_NAMES))
    assert user is not None and item is not None and at is not None
    used = {user.name, item.name, at.name}
    tasks = dict(_tasks(events, used))
    source: dict[str, Any] = {
        "kind": "log",
        "events": {
            "path": str(events.path), "user": user.name, "item": item.name, "time": _time(at),
            **_event_features(events, used),
        },
    }  # fmt: skip
    for section, key in (("items", item), ("users", user)):
        table = _catalogue(tables, events, key.name)
        if table is not None:
            source[section] = {"path": str(table.path), "id": key.name, **_content(table, key.name, section)}
    source["tasks"] = tasks or {"click": {"where": "true"}}
    if not tasks:
        source["negatives"] = 4
    return {"prepare": {"source": source}, "run": {"name": name}}


def _is_events(table: Table) -> bool:
    return all(_find_column(table, names) is not None for names in (USER_NAMES, ITEM_NAMES, TIME_NAMES))


def _find_column(table: Table, names: Sequence[str]) -> Column | None:
    """Return the column that matches a name: as a whole, by its part before a colon, or by one of its words."""
    for name in names:
        for column in table.columns.values():
            stem = column.name.lower().partition(":")[0]
            if name == stem or name in stem.replace("-", "_").split("_"):
                return column
    return None


def _time(column: Column) -> Any:
    if column.kind in ("BIGINT", "INTEGER", "DOUBLE", "HUGEINT", "UBIGINT"):
        return {"column": column.name, "unit": "s"}
    return column.name


def _tasks(events: Table, used: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for column in events.columns.values():
        stem = column.name.lower().partition(":")[0]
        is_flag = column.kind == "BOOLEAN" or set(column.values) <= {"0", "1"} and column.distinct == 2
        if column.name not in used and is_flag and any(word in LABEL_NAMES for word in (stem, *stem.split("_"))):
            used.add(column.name)
            yield stem, {"where": f"CAST({quoted(column.name)} AS INTEGER) = 1"}
    action, rating = _find_column(events, ACTION_NAMES), _find_column(events, RATING_NAMES)
    if action is not None and action.name not in used and len(action.values) >= 2:
        used.add(action.name)
        for value in action.values[1:]:
            yield (
                "".join(one if one.isalnum() else "_" for one in value.lower()),
                {"where": f"{quoted(action.name)} = {literal(value)}"},
            )
    if rating is not None and rating.name not in used and rating.kind != "VARCHAR":
        used.add(rating.name)
        yield "like", {"where": f"{quoted(rating.name)} >= 4"}


def _event_features(events: Table, used: set[str]) -> dict[str, Any]:
    categoricals = [
        column.name
        for column in events.columns.values()
        if column.name not in used and column.kind in ("VARCHAR", "BOOLEAN") and 2 <= column.distinct <= FEW_VALUES
        and column.words < TEXT_WORDS and column.distinct < events.rows / 10
    ]  # fmt: skip
    numbers = {
        column.name: 16
        for column in events.columns.values()
        if column.name not in used and column.kind in ("DOUBLE", "FLOAT") and column.distinct > 20
    }
    found: dict[str, Any] = {"categoricals": as_features(categoricals)} if categoricals else {}
    return found | ({"quantiles": numbers} if numbers else {})


def _catalogue(tables: Sequence[Table], events: Table, key: str) -> Table | None:
    """Return the table in which the key is unique."""
    for table in tables:
        column = table.columns.get(key)
        if table is not events and column is not None and column.distinct == table.rows:
            return table
    return None


def _content(table: Table, key: str, section: str) -> dict[str, Any]:
    columns = [column for column in table.columns.values() if column.name != key]
    text = [one.name for one in columns if one.kind == "VARCHAR" and one.words >= TEXT_WORDS]
    vectors = [one.name for one in columns if one.kind in ("DOUBLE[]", "FLOAT[]") or one.kind.startswith("FLOAT[")]
    most = max(FEW_VALUES, table.rows // 10)
    few = [
        one.name
        for one in columns
        if one.name not in text
        and not one.kind.endswith("]")
        and 2 <= one.distinct <= most
        and one.distinct < table.rows
    ]
    found = {
        "text": text if section == "items" else [],
        "embeddings": as_features(vectors),
        "categoricals": as_features(few),
    }
    return {name: values for name, values in found.items() if values}


def as_features(columns: Sequence[str]) -> list[str] | dict[str, str]:
    """Return columns as features, named by the part before a colon if there is one."""
    names = [column.partition(":")[0] for column in columns]
    return dict(zip(names, columns, strict=True)) if names != list(columns) else list(columns)


def as_yaml(config: Mapping[str, Any]) -> str:
    """Return a configuration as YAML for review."""
    head = "# Guessed by `python -m sidestack.pipelines.check --init`: look through it, then check it with --config.\n"
    return head + yaml.safe_dump(dict(config), sort_keys=False, width=120)
