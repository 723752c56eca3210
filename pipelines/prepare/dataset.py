"""Snapshots of any source: only partitions that the store lacks are made."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from sidestack.infra.code import code_digest, foreign_code
from sidestack.infra.config import digest
from sidestack.infra.distributed import World, broadcast, raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.partitions import PartitionEntry, date_slice, part_slice
from sidestack.infra.snapshot import CONTENT, Snapshot, write_snapshot
from sidestack.infra.stage import StageRun
from sidestack.infra.store import (
    Store,
    day_entries,
    in_order,
    missing_keys,
    require_same_columns_in_tables,
    write_day,
    write_part,
)
from sidestack.infra.tables import DatasetSpec, Entity, daily_tables
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.contract import STORE, Source, as_time

CODE = (
    "infra/checks.py", "infra/take.py", "infra/parquet.py", "infra/parquet_writer.py", "infra/requests.py",
    "infra/row_bytes.py", "infra/store.py", "infra/tables.py", "pipelines/prepare",
)  # fmt: skip
"""Code that decides a partition's bytes, besides its source."""


def write_dataset(run: StageRun[PrepareConfig], source: Source) -> None:
    """Make the partitions that the store lacks, each rank its share, and write the snapshot.

    Rank 0 makes the parts of items and users. Every rank must call it.

    Raises:
        DataError: the source's rows break the contract, a split has no rows, or partitions do not fit each other.
        PreemptedError: a rank got a stop signal; raised on every rank. Committed partitions are kept.
    """
    world, store = run.world.committing, Store(run.out.parent / STORE)
    code = digest({"ours": code_digest(CODE), **foreign_code([type(run.config.source)])})
    spec = source.spec
    with raise_on_all_ranks(world, "making items and users"):
        parts = [*_parts(store, source, "item", code), *_parts(store, source, "user", code)] if world.is_main else []
    with raise_on_all_ranks(world, "looking for the dates that are to be made"):
        days = list(source.days())
        keys = {day: _keys(source, day, code) for day in days}
        missing = _missing(store, keys) if world.is_main else {}
    missing = broadcast(world, missing)
    with (
        raise_on_all_ranks(world, "making the events"),
        run.log.progress(len(missing), "prepare: dates") as advance,
    ):
        for day, chunks in source.rows(days_of_rank(world, sorted(missing))):
            write_day(store, day, missing[day], spec, chunks)
            world.state.stop_if_asked()
            advance(world.size)
    with raise_on_all_ranks(world, "writing the snapshot"):
        if world.is_main:
            entries = [*parts, *(entry for day in days for entry in day_entries(store, day, keys[day]))]
            numbered = spec.model_copy(update={f"num_{CONTENT[one]}": _count(parts, CONTENT[one]) for one in CONTENT})
            require_same_columns_in_tables(store, entries)
            _require_known_ids(numbered, entries)
            _require_splits(numbered, entries, run.config.as_of)
            write_snapshot(run.out, run.out, numbered, Snapshot(
                store=str(store.path), as_of=as_time(run.config.as_of), partitions=tuple(in_order(entries))
            ))  # fmt: skip
            log_summary(run, numbered, entries, len(missing))


def _keys(source: Source, day: date, code: str) -> dict[str, str]:
    """Return the keys of a date's partitions by table."""
    of_source = source.day_keys(day)
    return {table: digest({"key": of_source[table], "code": code}) for table in daily_tables(source.spec)}


def _missing(store: Store, keys: Mapping[date, Mapping[str, str]]) -> dict[date, dict[str, str]]:
    """Return the keys of the partitions that are not in the store."""
    return {day: lacking for day, of_day in keys.items() if (lacking := missing_keys(store, day, of_day))}


def _parts(store: Store, source: Source, entity: Entity, code: str) -> Iterator[PartitionEntry]:
    first = 0
    for number, part in enumerate(source.parts(entity)):
        key = digest({"key": part.key, "code": code, "first": first})
        entry = store.find(CONTENT[entity], part_slice(number), key)
        if entry is None:
            entry = write_part(store, entity, number, key, first, part.schema, part.chunks(), part.origin)
        first += entry.facts["new"]
        yield entry


def _count(entries: Sequence[PartitionEntry], table: str) -> int:
    return sum(entry.facts["new"] for entry in entries if entry.table == table)


def _require_known_ids(spec: DatasetSpec, entries: Sequence[PartitionEntry]) -> None:
    """Check that all dates, also those made for another snapshot, have only ids of this snapshot's items and users."""
    for entry in entries:
        for column, number in (("item_id", spec.num_items), ("user_id", spec.num_users)):
            largest = entry.facts.get(f"max_{column}", -1)
            if largest >= number:
                raise DataError(
                    f"{entry.table}/{entry.slice}: {column} {largest} is outside the table [0, {number}) of the"
                    " parts that this snapshot knows"
                )


def _require_splits(spec: DatasetSpec, entries: Sequence[PartitionEntry], as_of: date | None) -> None:
    """Check that there are training rows, and test rows unless the test dates are after the snapshot's end."""
    for split, (first, last) in {"train": spec.train, "test": spec.test}.items():
        is_to_come = split == "test" and as_of is not None and as_of <= first
        rows = sum(entry.rows for entry in entries if entry.table == "events" and first <= entry.date <= last)
        if not rows and not is_to_come:
            before = f" before {as_of}" if as_of else ""
            raise DataError(f"events: the {split} dates, {first} to {last}, have no rows{before}")


def days_of_rank(world: World, days: Sequence[date]) -> list[date]:
    """Return this rank's days: contiguous, so that a rank reads only its own weeks of a raw log."""
    first, last = (len(days) * rank // world.size for rank in (world.rank, world.rank + 1))
    return list(days[first:last])


def log_summary(run: StageRun[PrepareConfig], spec: DatasetSpec, entries: Sequence[PartitionEntry], made: int) -> None:
    """Log and record the snapshot's contents."""
    by = {"train": spec.train, "test": spec.test}
    days = {entry.slice for entry in entries if entry.table == "events"}
    summary: dict[str, Any] = {"items": spec.num_items, "users": spec.num_users, "dates": len(days), "dates_made": made}
    run.log.info(
        f"{spec.num_items:,} items, {spec.num_users:,} users, {len(days)} dates of events, {made} of them made now"
    )
    for split, (first, last) in by.items():
        names = {date_slice(first + timedelta(days=n)) for n in range((last - first).days + 1)}
        own = [entry for entry in entries if entry.slice in names]
        counts, words = _label_counts(spec, own)
        summary[split] = counts
        run.log.info(f"{split}: {counts['impressions']:,} impressions of {counts['requests']:,} requests{words}")
    run.log.summary(summary)


def _label_counts(spec: DatasetSpec, own: Sequence[PartitionEntry]) -> tuple[dict[str, Any], str]:
    counts: dict[str, Any] = {
        "impressions": sum(entry.rows for entry in own if entry.table == "events"),
        "requests": sum(entry.rows for entry in own if entry.table == "requests"),
    }
    words = ""
    for task, one in spec.tasks.items():
        judged, positive = (
            sum(entry.facts[f"{what}_{task}"] for entry in own if entry.table == "labels")
            for what in ("judged", "positive")
        )
        counts[task] = {"judged": judged, "positive": positive}
        of = f" of {judged:,} with a known label" if one.given is None else f" of {judged:,} followed-up {one.given}s"
        words += f", {positive / max(judged, 1):.1%}{of} are {task}"
    return counts, words
