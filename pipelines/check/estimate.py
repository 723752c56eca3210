"""Estimates of a run's disk, memory and time from measured rates, and warnings about its verdict."""

import os
from collections.abc import Iterator

from sidestack.encoder.budget import decide as encoder_budget
from sidestack.pipelines.check.profile import Profile
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.units import byte_size
from sidestack.ranker.budget import decide as ranker_budget
from sidestack.ranker.budget import even_days
from sidestack.ranker.intervals import student_reach

BYTES_AN_IMPRESSION = 50
"""On disk: tables, SIDs and ingested raw rows; docs/results/growth.md has 31 to 34 for tables and SIDs."""
BYTES_AN_ITEM = 1_000
"""An embedding of 384 float16 values, and its SID."""
TEXTS_A_SECOND = 158
"""Throughput of the sentence encoder per core (docs/results)."""
EVENTS_A_SECOND = 60_000
"""Throughput of prepare per core: ingest, histories, counts."""
SAMPLES_A_SECOND = 5_000
"""Throughput of the ranker's slower arms per core (docs/results/complete_journey.md)."""
ITEM_ENCODINGS_A_SECOND = 4_000
"""Throughput of the encoder's training per core."""
RANKER_BYTES = 2 << 30
FEW_POSITIVES = 1_000
"""With fewer test positives, gains of a few per mille cannot be distinguished from chance."""


def estimates(found: Profile, config: PipelineConfig) -> list[tuple[str, str]]:
    """Return lines of text about disk, memory and time."""
    cores = os.cpu_count() or 1
    disk = found.rows * BYTES_AN_IMPRESSION + found.items * BYTES_AN_ITEM
    tables = 4 * config.ranker.model.embedding_dim * (found.users + 2 * found.items)
    prepare = found.texts / TEXTS_A_SECOND / cores + found.rows / EVENTS_A_SECOND / cores
    encoder = found.items * encoder_budget(config.encoder, found.items).training.epochs / ITEM_ENCODINGS_A_SECOND
    arms = len(config.arms) * config.run.replicates
    ranker = arms * _passes(found, config) * found.rows / SAMPLES_A_SECOND
    minutes = (prepare + config.run.replicates * encoder + ranker) / 60
    return [
        ("disk", f"about {byte_size(disk)}"),
        ("memory", f"about {byte_size(RANKER_BYTES + 2 * tables)} a ranker stage on a CPU"),
        (
            "time",
            f"about {max(minutes, 1):,.0f} min on {cores} cores, {arms} trainings of the ranker; to a factor of 3",
        ),
    ]


def _passes(found: Profile, config: PipelineConfig) -> int:
    """Return how often a ranker training reads its rows: at least three times with a validation window.

    Two epochs show that the second is worse; the arm is then trained for one (`ranker.validation`).
    """
    dates = found.train or (found.first, found.last)
    training = ranker_budget(config.ranker, even_days(dates, found.rows)).training
    return 3 if training.validation_days else training.epochs


def warnings(found: Profile, config: PipelineConfig) -> Iterator[str]:
    """Yield warnings about what a verdict on this log will lack."""
    if found.train is None:
        yield f"{found.num_days} dates are too few to train on some and test on others"
    for name, task in found.tasks.items():
        if task.positives in (0, found.seen):
            rule = (
                "look at its condition"
                if not task.positives
                else "set prepare.source.negatives, to draw items for them"
            )
            yield f"task {name}: all labels are {int(task.positives > 0)}; {rule}"
        elif task.test_positives < FEW_POSITIVES:
            yield f"task {name}: {task.test_positives:,} positives in the test dates: expect no verdict on small gains"
    if found.listed is not None and found.listed < 0.9:
        yield f"{1 - found.listed:.1%} of events are of items that the catalogue lacks: they have no content"
    if config.run.replicates == 1:
        yield "run.replicates=1: one training is no result, as another seed may turn a gain around"
    if config.run.replicates == 2 and len(config.arms) > 1:
        confidence, others = config.compare.confidence, len(config.arms) - 1
        two, three = (student_reach(confidence, number, others * (number - 1)) for number in (2, 3))
        reach = f"{two:.1f} standard deviations of a gain, of three trainings {three:.1f}"
        yield f"run.replicates=2: intervals reach {reach}"
