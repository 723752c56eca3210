"""The cost of adding one day to a log, by the log's length, and the bytes per impression on disk.

`python -m benchmarks.growth [--quick] [--dataset DIR] [--out DIR]`. A synthetic log grows day by day through the bodies
of stages `prepare` and `materialize`, in this process. With `--dataset`, the bytes per impression are also measured for
that snapshot, such as a run's output of `materialize`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from sidestack.benchmarks.events import IMPRESSIONS
from sidestack.benchmarks.goals import PageTable, goal, publish_tables
from sidestack.benchmarks.items import ALONE, CATEGORIES, DIM, write_encoder
from sidestack.benchmarks.record import Row, results_folder
from sidestack.benchmarks.timing import Spread, threads
from sidestack.encoder.config import EncoderConfig, MaterializeConfig
from sidestack.encoder.materialize import materialize
from sidestack.infra.commit import committing
from sidestack.infra.config import plain
from sidestack.infra.partitions import LISTS
from sidestack.infra.snapshot import Dataset, read_dataset, write_snapshot
from sidestack.infra.stage import StageRun
from sidestack.infra.tables import daily_tables
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.join import join
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.contract import STORE
from sidestack.pipelines.prepare.stage import prepare
from sidestack.pipelines.prepare.synthetic import Synthetic

FIRST_DAY = date(2024, 1, 1)
TRAIN_DAYS = 8
WORDS = f"""
A synthetic log, {IMPRESSIONS} impressions a request, whose conversions are known after two days; one set of SIDs of an
encoder that was not trained. Each stage runs on the log of so many days, and then, measured, on the log of one day
more. One process, one thread of torch.
"""
GROWTH_WORDS = """
"partitions" are what the stage writes into the store, manifests included: in prepare the new day's requests, events
and labels, and the labels of earlier days that mature meanwhile; in materialize the new day's SIDs. Their seconds are
those of the stage's body. "lists" are the lists of partitions that it writes: one a table and month, those of the
months with new partitions alone. "snapshot" is the stage's output, which names all lists; its seconds are those of
writing it, and reading it with all its lists, once more, by themselves. "of a day" are bytes over those of the new
day's own partitions, SIDs included.
"""
LAYOUT_WORDS = """
Version 1 repeats the request's columns, history and SIDs for each of its impressions, as `python -m pipelines.join`
writes them; version 2 has them once a request. Bytes are those on disk, manifests included, of the same impressions.
"""
GROWTH_COLUMNS = {
    "days": ",d", "stage": "", "what": "", "files": ",d", "bytes": ",d", "of_a_day": ".2f", "seconds": ".3f",
}  # fmt: skip
GOALS = {"bytes": 0.9, "all bytes": 0.5, "seconds": 0.5}
"""The minimum ratio of a short log's cost to a long one's. `all bytes` include lists and snapshot, which grow within a
month, and by one line per month."""
LAYOUT_COLUMNS = {"log": "", "impressions": ",d", "layout": "", "part": "", "bytes_an_impression": ".1f"}


@dataclass(frozen=True)
class Sizes:
    """Days of the logs before one more day is added, ascending; impressions per day, and items of the log."""

    days: tuple[int, ...]
    impressions: int
    items: int


FULL = Sizes(days=(10, 100, 1000), impressions=2000, items=2000)
QUICK = Sizes(days=(3, 6), impressions=200, items=200)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short logs of small days, to see that it runs")
    parser.add_argument(
        "--dataset", type=Path, metavar="DIR", help="a snapshot whose bytes an impression are printed, too"
    )
    parser.add_argument("--out", type=Path, help="where growth.json and growth.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="sidestack-growth-") as folder, threads(1):
        log = GrowingLog(Path(folder), QUICK if arguments.quick else FULL)
        rows = [row for days in log.sizes.days for row in day_added(log, days)]
        layouts = layout_rows("synthetic", read_dataset(log.outputs["materialize"]), Path(folder) / "synthetic")
        if arguments.dataset is not None:
            layouts += layout_rows(arguments.dataset.name, read_dataset(arguments.dataset), Path(folder) / "given")
    tables = [
        PageTable("A day added", GROWTH_WORDS, rows, GROWTH_COLUMNS),
        PageTable("Bytes an impression", LAYOUT_WORDS, layouts, LAYOUT_COLUMNS),
    ]
    publish_tables("growth", "A log that grows", WORDS, tables, goals(rows), packages=["pyarrow"], out=out)


class GrowingLog:
    """A synthetic log and its snapshots, which share a store.

    Args of the constructor:
        folder: for the log, the store and all outputs. sizes: of the log.

    Attributes:
        outputs: the newest output of each stage.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.store = folder / STORE
        self.outputs: dict[str, Path] = {}
        self._folder = folder
        self._source = Synthetic(
            kind="synthetic",
            num_items=sizes.items,
            first_day=FIRST_DAY,
            train_days=TRAIN_DAYS,
            test_days=max(*sizes.days, TRAIN_DAYS) + 2 - TRAIN_DAYS,
            events_per_day=sizes.impressions,
            impressions_per_request=IMPRESSIONS,
            embeddings={"embedding": DIM},
            categoricals={"category": CATEGORIES},
        )
        write_encoder(folder / "encoder", EncoderConfig())

    def prepare(self, days: int) -> None:
        """Run stage `prepare` on the first days of the log."""
        config = PrepareConfig(source=self._source, as_of=FIRST_DAY + timedelta(days=days))
        self._run("prepare", prepare, config, {}, days)

    def materialize(self, days: int) -> None:
        """Run stage `materialize` on the output of `prepare`."""
        inputs = {"dataset": self.outputs["prepare"], "encoder.sid": self._folder / "encoder"}
        self._run("materialize", materialize, MaterializeConfig(), inputs, days)

    def _run(
        self, stage: str, body: Callable[[StageRun[Any]], None], config: Any, inputs: Mapping[str, Path], days: int
    ) -> None:
        out = self._folder / f"{stage}-{days}"
        with committing(out, ALONE, stage=stage) as staging:
            log = RunLog.open(ALONE.rank, stage, staging, plain(config), inputs, "", None)
            body(StageRun(config, inputs, staging, ALONE, log))
        self.outputs[stage] = out


def day_added(log: GrowingLog, days: int) -> list[Row]:
    """Grow the log to `days` days, and measure both stages for one more day."""
    log.prepare(days)
    log.materialize(days)
    rows: list[dict[str, Any]] = []
    for stage, run in (("prepare", log.prepare), ("materialize", log.materialize)):
        before = files_below(log.store)
        began = time.perf_counter()
        run(days + 1)
        seconds = time.perf_counter() - began
        new = {file: size for file, size in files_below(log.store).items() if file not in before}
        lists = [size for file, size in new.items() if file.parent.name == LISTS]
        made = [size for file, size in new.items() if file.parent.name != LISTS]
        found = {"days": days, "stage": stage}
        rows.append({**found, "what": "partitions", "files": len(made), "bytes": sum(made), "seconds": seconds})
        rows.append({**found, "what": "lists", "files": len(lists), "bytes": sum(lists), "seconds": None})
        rows.append({**found, "what": "snapshot", **snapshot_cost(log.outputs[stage])})
    of_a_day = sum(bytes_by_table(read_dataset(log.outputs["materialize"]), FIRST_DAY + timedelta(days=days)).values())
    return [{**row, "of_a_day": row["bytes"] / of_a_day} for row in rows]


def files_below(folder: Path) -> dict[Path, int]:
    """Return the sizes of all files below a folder."""
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def snapshot_cost(path: Path) -> Row:
    """Return the bytes of a stage's output, and the seconds of writing and reading its snapshot."""
    dataset = read_dataset(path)
    listed = dataset.snapshot.model_copy(update={"store": str(dataset.store)})
    with tempfile.TemporaryDirectory(dir=path.parent) as copy:
        began = time.perf_counter()
        write_snapshot(Path(copy), Path(copy), dataset.spec, listed)
        read_dataset(Path(copy))
        seconds = time.perf_counter() - began
    written = files_below(path)
    return {"files": len(written), "bytes": sum(written.values()), "seconds": seconds}


def bytes_by_table(dataset: Dataset, day: date | None = None) -> dict[str, int]:
    """Return the bytes of the partitions of impressions and their SIDs, by table, for all dates or one date."""
    found: dict[str, int] = {}
    sids = [one.table(name, base) for name, one in dataset.snapshot.sids.items() for base in one.columns]
    daily = daily_tables(dataset.spec)
    for table in (*daily, *(name for name in sids if name.endswith(daily))):
        entries = dataset.partitions(table, day or date.min, day or date.max)
        found[table] = sum(sum(files_below(dataset.store / entry.path).values()) for entry in entries)
    return found


def layout_rows(name: str, dataset: Dataset, folder: Path) -> list[Row]:
    """Measure the bytes per impression in both layouts.

    Args:
        name: of the log. dataset: a snapshot of it. folder: for the joined copy.
    """
    impressions = join(dataset, folder, date.min, date.max)
    joined = {"all columns": sum(files_below(folder).values())}
    apart = bytes_by_table(dataset)
    named = {
        "version 1": joined,
        "version 2": {**{_of_set(table): number for table, number in apart.items()}, "together": sum(apart.values())},
    }
    found = {"log": name, "impressions": impressions}
    return [
        {**found, "layout": layout, "part": part, "bytes_an_impression": number / impressions}
        for layout, parts in named.items()
        for part, number in parts.items()
    ]


def _of_set(table: str) -> str:
    """Return a table's display name; for SIDs, without the generation."""
    if not table.startswith("sids/"):
        return table
    _, name, _, base = table.split("/")
    return f"SIDs {name!r} of {base}"


def goals(rows: list[Row]) -> list[Row]:
    """Compare the cost of a day for the longest log with that for the shortest."""
    found: list[Row] = []
    days = sorted({row["days"] for row in rows})
    for stage in ("prepare", "materialize"):
        few, many = (_cost(rows, stage, number) for number in (days[0], days[-1]))
        for value, at_least in GOALS.items():
            ratio = few[value] / many[value]
            what = f"{value} of a day, {stage}, added to {days[0]:,} days / to {days[-1]:,}"
            found.append(goal(what, Spread(ratio, ratio, ratio), at_least))
    return found


def _cost(rows: list[Row], stage: str, days: int) -> dict[str, float]:
    """Return a stage's cost of one added day, by the names of `GOALS`."""
    own = {row["what"]: row for row in rows if (row["stage"], row["days"]) == (stage, days)}
    made = own["partitions"]
    return {"bytes": made["bytes"], "all bytes": sum(row["bytes"] for row in own.values()), "seconds": made["seconds"]}


if __name__ == "__main__":
    main()
