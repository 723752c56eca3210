"""Typed columns from raw ones: by a lossless cast, or an error with the rule that a value breaks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidestack.infra.sql import quoted
from sidestack.pipelines.prepare.log.config import TimeColumn

Types = Mapping[str, str]
"""A file's columns: name -> DuckDB's type."""

FIRST_TIME, END_TIME = "1971-01-01", "2100-01-01"
"""Times outside this range are taken as a sign of a wrong unit."""
_NS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}


@dataclass(frozen=True)
class RawColumn:
    """A typed column, computed from columns of a file.

    Attributes:
        sources: the file's columns. kind: DuckDB's type of the result.
        sql: returns the expression over the file's columns, null for a value that breaks the rule.
        rule: what a value must be, for error messages.
        zone: the session's time zone that the expression needs.
        count: returns the expression of the number of values, for a column of lists whose first value `sql` takes.
    """

    sources: tuple[str, ...]
    kind: str
    sql: Callable[[Types], str]
    rule: str
    zone: str | None = None
    count: Callable[[Types], str] | None = None

    def presence_condition(self, types: Types) -> str:
        """Return the condition that a row has a value, valid or not."""
        if self.count is not None:
            return f"{self.count(types)} > 0"
        return " OR ".join(f"{quoted(source)} IS NOT NULL" for source in self.sources) or "true"


def key(column: str) -> RawColumn:
    """Return an id as text; whole numbers stored as floats lose their `.0`."""
    name = quoted(column)

    def sql(types: Types) -> str:
        if types[column] in ("DOUBLE", "FLOAT"):
            return f"CASE WHEN {name} = floor({name}) THEN CAST(TRY_CAST({name} AS HUGEINT) AS VARCHAR) END"
        return "CAST(NULL AS VARCHAR)" if _is_list(types[column]) else f"CAST({name} AS VARCHAR)"

    return RawColumn((column,), "VARCHAR", sql, "must be an id: text or a whole number")


def time(config: TimeColumn) -> RawColumn:
    """Return a time in microseconds, UTC."""
    name = quoted(config.column)

    def sql(types: Types) -> str:
        kind = types[config.column]
        if kind in ("VARCHAR", "DATE") or kind.startswith("TIMESTAMP"):
            found = f"TRY_CAST({name} AS TIMESTAMPTZ) AT TIME ZONE 'UTC'"
        elif kind in ("DOUBLE", "FLOAT") or kind.startswith("DECIMAL"):
            found = _of_epoch(f"CAST({name} AS DOUBLE) * {_NS[config.unit] / 1000}")
        else:
            found = _of_epoch(f"TRY_CAST({name} AS HUGEINT) * {_NS[config.unit]} // 1000")
        return f"CASE WHEN {found} >= TIMESTAMP '{FIRST_TIME}' AND {found} < TIMESTAMP '{END_TIME}' THEN {found} END"

    rule = f"must be a time from {FIRST_TIME} on and before {END_TIME} (unit {config.unit}, zone {config.zone})"
    return RawColumn((config.column,), "TIMESTAMP", sql, rule, config.zone)


def _of_epoch(us: str) -> str:
    return f"make_timestamp(TRY_CAST(CASE WHEN abs({us}) < 5e15 THEN {us} END AS BIGINT))"


def number(column: str) -> RawColumn:
    """Return a finite number."""
    value = f"TRY_CAST({quoted(column)} AS DOUBLE)"
    return RawColumn(
        (column,), "DOUBLE", lambda types: f"CASE WHEN isfinite({value}) THEN {value} END", "must be a finite number"
    )


def category(column: str) -> RawColumn:
    """Return a value as text; for a list, the first non-null value, as signals and features have one value."""
    name = quoted(column)
    values = f"list_filter({name}, lambda one: one IS NOT NULL)"

    def sql(types: Types) -> str:
        return f"CAST({f'{values}[1]' if _is_list(types[column]) else name} AS VARCHAR)"

    def count(types: Types) -> str:
        return f"coalesce(len({values}), 0)" if _is_list(types[column]) else f"CAST({name} IS NOT NULL AS INTEGER)"

    return RawColumn((column,), "VARCHAR", sql, "must be text, a number, or a list of these", count=count)


def text(columns: tuple[str, ...]) -> RawColumn:
    """Join several columns into one text."""

    def sql(types: Types) -> str:
        parts = (
            f"array_to_string({quoted(name)}, ' ')" if _is_list(types[name]) else f"CAST({quoted(name)} AS VARCHAR)"
            for name in columns
        )
        return f"concat_ws(', ', {', '.join(parts)})"

    return RawColumn(columns, "VARCHAR", sql, "must be text")


def vector(column: str) -> RawColumn:
    """Return a list of finite numbers, in single precision."""
    value = f"TRY_CAST({quoted(column)} AS FLOAT[])"
    is_finite = f"len(list_filter({value}, lambda x: x IS NULL OR NOT isfinite(x))) = 0"
    return RawColumn(
        (column,),
        "FLOAT[]",
        lambda types: f"CASE WHEN {is_finite} THEN {value} END",
        "must be a list of finite numbers that single precision holds",
    )


def condition(where: str) -> RawColumn:
    """Return whether a condition over the file's columns holds: 1 or 0."""
    return RawColumn(
        (),
        "TINYINT",
        lambda types: f"CAST(coalesce(CAST(({where}) AS BOOLEAN), false) AS TINYINT)",
        "must be a condition",
    )


def _is_list(kind: str) -> bool:
    return kind.endswith("]")
