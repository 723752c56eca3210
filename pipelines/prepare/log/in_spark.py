"""Translation of DuckDB's SQL to Spark's: by sqlglot, with a window for ASOF joins, which Spark 4.0 lacks."""

from collections.abc import Mapping, Sequence

from sqlglot import ErrorLevel, transpile


def in_spark(query: str) -> str:
    """Translate a query from DuckDB's dialect to Spark's.

    sqlglot leaves unknown expressions as they are, and silently drops the order of `list(a ORDER BY b)`. That is why
    the tests require the same bytes for a log on both engines.

    Raises:
        sqlglot.errors.UnsupportedError: Spark has no such expression.
    """
    found: str = transpile(query, read="duckdb", write="spark", unsupported_level=ErrorLevel.RAISE)[0]
    return found


def asof_by_window(
    asked: str, known: str, by: Sequence[str], at: str, values: Mapping[str, str], *, is_later: bool
) -> str:
    """Return an ASOF join as a window over the rows of both queries, ordered by time; see `Engine.asof`.

    At equal times, a row of `asked` is sorted before the rows of `known` that it must not match, or after those it
    must.
    """
    keys, turn = ", ".join(by), " DESC" if is_later else ""
    taken = ", ".join(f"known.{column} AS {name}" for name, column in values.items())
    sides = (
        f"SELECT STRUCT(asked.*) AS asked, NULL AS known, {keys}, {at} AS at, false AS is_known"
        f" FROM ({asked}) AS asked UNION ALL"
        f" SELECT NULL, STRUCT(known.*), {keys}, event_time, true FROM ({known}) AS known"
    )
    return (
        f"SELECT asked.*, {taken} FROM (SELECT asked, is_known, last_value(known IGNORE NULLS) OVER (PARTITION BY"
        f" {keys} ORDER BY at{turn}, is_known{turn} ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS known"
        f" FROM ({sides})) WHERE NOT is_known"
    )
