"""Stage `score`: a trained ranker's probabilities for every row of a snapshot.

    python -m ranker.score --model DIR --dataset DIR --out DIR

`--model` is the output of a ranker's stage, `--dataset` a snapshot with its SIDs. Any number of ranks can run it, under
torchrun. Rows are scored in parts of whole dates. Each part is committed separately beside the output, so an
interrupted run resumes with the part it was in. The output has the format of a ranker's predictions.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

from sidestack.infra.checkpoint import MACHINE
from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import World, barrier, raise_on_all_ranks
from sidestack.infra.errors import DataError
from sidestack.infra.lanes import LaneReader
from sidestack.infra.manifest import MANIFEST, fetched, is_committed, read_manifest
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.remote.copies import remove_folder
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import StageRun, run_stage, with_inputs
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.bundle import RankerBundle, open_bundle
from sidestack.ranker.bundle_description import require_sids, require_trained_columns
from sidestack.ranker.config import Dates
from sidestack.ranker.constants import read_constants
from sidestack.ranker.cost import expected_traffic
from sidestack.ranker.features import ArmFeatures, dataset_sids
from sidestack.ranker.fit import start_model
from sidestack.ranker.predict import predict
from sidestack.ranker.predictions import FOLDER as PREDICTIONS
from sidestack.ranker.reader import Split, content_read
from sidestack.ranker.score_config import ScoreConfig, format_ranges
from sidestack.ranker.trainer import Model


class Part(NamedTuple):
    """Dates that are scored together (first and last), the number of their first row, and their number of rows."""

    dates: Dates
    first_row: int
    rows: int


@dataclass(frozen=True)
class Scoring:
    """A loaded ranker with its inputs, for scoring.

    Attributes:
        config: the one that the ranker was trained with. work: the digest of all that determines the probabilities.
        folder: where parts are committed.
    """

    model: Model
    features: ArmFeatures
    config: DecidedConfig
    dataset: Dataset
    work: str
    folder: Path


def score(run: StageRun[ScoreConfig]) -> None:
    """Score every row; the body of the stage.

    Raises:
        DataError: the model is no ranker, or the snapshot lacks its columns. SpecError: the SIDs are another encoder's.
    """
    world = run.world
    with raise_on_all_ranks(world, "opening model and snapshot"):
        bundle, dataset = open_bundle(run.inputs["model"]), read_dataset(run.inputs["dataset"])
        where = f"dataset={run.inputs['dataset']}"
        require_trained_columns(bundle.description, dataset.spec, where)
        require_sids(bundle.description, dataset_sids(dataset), where)
        parts = parts_of(dataset, run.config)
    scoring = _load_scoring(run, bundle, dataset, parts)
    began, fresh = time.monotonic(), 0
    for number, part in enumerate(parts):
        fresh += 0 if _score_part(run, scoring, number, part) else part.rows
    with raise_on_all_ranks(world, "collecting the parts"):
        if world.is_main:
            _collect(scoring.folder, len(parts), run.out / PREDICTIONS)
    seconds, rows = time.monotonic() - began, sum(part.rows for part in parts)
    if world.is_main:
        speed = f", {fresh / seconds:,.0f} rows/s" if fresh else ""
        run.log.info(f"score: {rows:,} rows, {rows - fresh:,} of them scored before{speed}")
        run.log.summary({"rows": rows, "scored_before": rows - fresh, "rows_per_second": fresh / seconds})
    run.facts["rows"] = rows
    barrier(world)


def parts_of(dataset: Dataset, config: ScoreConfig) -> list[Part]:
    """Split the snapshot's dates into parts.

    Raises:
        DataError: there are no rows.
    """
    parts: list[Part] = []
    row = 0
    for dates in config.dates or ((date.min, date.max),):
        for entries in _group_entries(dataset.partitions("events", *dates), config.part_rows):
            rows = sum(entry.rows for entry in entries)
            parts.append(Part((entries[0].date, entries[-1].date), row, rows))
            row += rows
    if not row:
        which = f" from {format_ranges(config.dates)}" if config.dates else ""
        raise DataError(f"{dataset.path}: the snapshot has no rows{which}")
    return parts


def _group_entries(entries: Sequence[PartitionEntry], rows: int) -> Iterator[list[PartitionEntry]]:
    group: list[PartitionEntry] = []
    for entry in entries:
        group.append(entry)
        if sum(one.rows for one in group) >= rows:
            yield group
            group = []
    if any(one.rows for one in group):
        yield group


def _load_scoring(run: StageRun[ScoreConfig], bundle: RankerBundle, dataset: Dataset, parts: Sequence[Part]) -> Scoring:
    assert run.checkpoints is not None
    world, config = run.world, bundle.description.config
    dates = parts[0].dates[0], parts[-1].dates[1]
    features = bundle.features(dataset.spec)
    dataset.verify(world, content_read(dataset, features))
    with raise_on_all_ranks(world, "reading what content needs"):
        constants = read_constants(dataset, features.constants)
        traffic = expected_traffic(dataset, dates, config.training)
    model = start_model(features, config, world, constants, traffic)
    with raise_on_all_ranks(world, "reading the ranker"):
        bundle.load(model.sharded, features)
    work = {name: value for name, value in run.checkpoints.work.items() if name not in MACHINE}
    return Scoring(model, features, config, dataset, digest(work), run.checkpoints.parts)


def _score_part(run: StageRun[ScoreConfig], scoring: Scoring, number: int, part: Part) -> bool:
    """Score a part unless an earlier run did; return whether it did."""
    world, out = run.world, _folder(scoring.folder, number)
    if _is_done(world, out, scoring.work):
        return True
    split = Split(part.dates, scoring.dataset, scoring.features)
    scoring.dataset.verify(world, split.partitions)
    reader: LaneReader = split.open(scoring.config.training, world, is_training=False)
    name = f"{scoring.config.arm}, {part.dates[0]} to {part.dates[1]}"
    with committing(out, world, stage="score-part", key=scoring.work) as staging:
        predict(scoring.model.runner, reader, name, staging, run.log, part.first_row)
    return False


def _is_done(world: World, out: Path, work: str) -> bool:
    """Return whether a part was committed by the same work; remove a part of other work."""
    with raise_on_all_ranks(world.committing, f"looking at {out}"):
        is_done = is_committed(out) and read_manifest(out).key == work
    barrier(world)  # no rank reads the folder any more
    if world.is_main and not is_done:
        remove_folder(out, first=MANIFEST)
    barrier(world)
    return is_done


def _folder(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}"


def _collect(folder: Path, parts: int, out: Path) -> None:
    """Collect the files of all parts in one folder, as hard links where the file system has them, else as copies."""
    out.mkdir()
    for number in range(parts):
        for file in sorted(fetched(_folder(folder, number)).glob("*.parquet")):
            name = out / f"part-{number:05d}-{file.name.removeprefix('part-')}"
            try:
                os.link(file, name)
            except OSError:
                shutil.copyfile(file, name)


def main() -> None:
    """Run the stage from the command line."""
    argv = with_inputs(sys.argv[1:], ("model", "dataset"))
    run_stage("score", "score", ScoreConfig, ["model", "dataset"], score, argv)


if __name__ == "__main__":
    main()
