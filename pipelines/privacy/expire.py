"""`python -m pipelines.privacy.expire --snapshot DIR [--before DATE] [--keep DIR ...]`: delete what is too old.

Deletes from the store of a raw log's snapshot the typed rows, the tables' dates with their SID columns, and the states
of histories and counts before a date; by default before the first date that the snapshot keeps by
`prepare.source.privacy.retention_days`. A later prepare neither reads nor makes these dates again. Run it while no
stage uses the store.
"""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.manifest import MANIFEST, read_manifest
from sidestack.infra.partitions import slice_date
from sidestack.infra.remote.urls import local_argument
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store
from sidestack.pipelines.prepare.log.retention import RETAINED_SINCE, record_deleted
from sidestack.pipelines.privacy.typed_files import remove_rows_before
from sidestack.pipelines.run import exit_status


@dataclass(frozen=True)
class Expired:
    """Result of an expiry: deleted and kept partitions, as directories relative to the store.

    Attributes:
        before: rows before this date are deleted. deleted: the partitions.
        shortened: typed files that also had later rows, and now have only these.
        kept: partitions before the date that are in a kept snapshot.
    """

    before: date
    deleted: tuple[str, ...]
    shortened: tuple[str, ...]
    kept: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield a report for people, line by line."""
        yield f"rows before {self.before}: {len(self.deleted):,} partitions are deleted"
        yield from (f"  {path}" for path in self.deleted)
        for paths, what in (
            (self.shortened, "typed files had later rows too; only these are left"),
            (self.kept, "partitions stay, as a snapshot that is kept lists them"),
        ):
            if paths:
                yield f"{len(paths):,} {what}"
                yield from (f"  {path}" for path in paths)


def retained_since(snapshot: Path) -> date | None:
    """Return the first date that a snapshot of a raw log keeps; None without a limit."""
    found = read_manifest(snapshot).facts.get(RETAINED_SINCE)
    return None if found is None else date.fromisoformat(found)


def expire(store: Store, before: date, keep: Sequence[Path] = ()) -> Expired:
    """Delete a raw log's stored dates before a given date, except partitions that kept snapshots list.

    The manifest of a typed file stays, with the row counts of its dates, so the raw file is not read again.

    Args:
        store: the log's. before: the first date to keep. keep: snapshots whose partitions stay.

    Raises:
        DataError: the store is not a raw log's, or a snapshot is from another store; nothing is deleted then.
    """
    if not (store.path / "raw/events").is_dir():
        raise DataError(f"{store.path}: is no store of a raw log (kind: log); retention deletes from no other")
    listed = _listed(store, keep)
    old = {path.relative_to(store.path).as_posix(): path for path in _dated_before(store, before)}
    typed = {path.relative_to(store.path).as_posix(): path for path in _typed(store)}
    record_deleted(store, before)  # first: if this run is interrupted, a later prepare must not look for deleted rows
    for name in old.keys() - listed:
        _remove(old[name])
    left = {name: rows for name, path in typed.items() if (rows := remove_rows_before(path, before)) is not None}
    emptied = [name for name, rows in left.items() if not rows]
    return Expired(
        before,
        deleted=tuple(sorted([*(old.keys() - listed), *emptied])),
        shortened=tuple(sorted(left.keys() - set(emptied))),
        kept=tuple(sorted(old.keys() & listed)),
    )


def _listed(store: Store, keep: Sequence[Path]) -> set[str]:
    """Return the partitions of snapshots."""
    datasets = [read_dataset(path) for path in keep]
    for dataset in datasets:
        if dataset.store.resolve() != store.path.resolve():
            raise DataError(f"{dataset.path}: is a snapshot of {dataset.store}, not of {store.path}")
    return {entry.path for dataset in datasets for entry in dataset.snapshot.partitions}


def _dated_before(store: Store, before: date) -> list[Path]:
    """Return all tables' partitions of dates before one, and leftovers of interrupted runs."""
    return [path for path in store.path.glob("**/date=*/*/") if slice_date(path.parent.name, path) < before]


def _typed(store: Store) -> list[Path]:
    """Return the partitions of typed files that have times."""
    tables = [store.path / "raw/events", *sorted((store.path / "raw").glob("labels.*"))]
    return sorted(file.parent for table in tables for file in table.glob(f"file=*/*/{MANIFEST}"))


def _remove(path: Path) -> None:
    (path / MANIFEST).unlink(missing_ok=True)  # first: without a manifest, the leftovers are not a partition
    shutil.rmtree(path)
    if not any(path.parent.iterdir()):
        path.parent.rmdir()


def main() -> None:
    """Run the command; print an error as one message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.privacy.expire", description=__doc__)
    parser.add_argument(
        "--snapshot", type=local_argument, required=True, metavar="DIR", help="a snapshot; it stays whole"
    )
    parser.add_argument("--before", type=date.fromisoformat, metavar="DATE", help="the first date that stays")
    parser.add_argument(
        "--keep", type=local_argument, nargs="*", default=[], metavar="DIR", help="further snapshots that stay"
    )
    arguments = parser.parse_args()
    with exit_status():
        before = arguments.before or retained_since(arguments.snapshot)
        if before is None:
            raise ConfigError(
                f"{arguments.snapshot}: was made without prepare.source.privacy.retention_days; give --before DATE"
            )
        store = Store(read_dataset(arguments.snapshot).store)
        print("\n".join(expire(store, before, [arguments.snapshot, *arguments.keep]).lines()))


if __name__ == "__main__":
    main()
