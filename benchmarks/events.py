"""A ranking dataset for benchmarks, of any size: a synthetic log whose items have the SIDs of an untrained encoder.

Made by the stages themselves, `pipelines.prepare` and `encoder.materialize`. Speed does not depend on the ids' values.
"""

import sys
from pathlib import Path

from sidestack.benchmarks.items import CATEGORIES, DIM, write_encoder
from sidestack.benchmarks.timing import run_program
from sidestack.encoder.config import EncoderConfig
from sidestack.infra.config import to_yaml
from sidestack.infra.snapshot import Dataset, read_dataset

NUM_ITEMS, NUM_USERS, MAX_HISTORY = 92_331, 2_469, 32
"""The numbers of the default data, Complete Journey."""
IMPRESSIONS = 22
"""Impressions per request, the average size of a basket of the default data."""
EVENTS_A_DAY = 8192
EMBEDDINGS = {"embedding": DIM, "text_embedding": 384}
"""Embeddings and their dimensions, as in the default data. The encoder takes the first; `dense` takes both."""


def write_events(folder: Path, days: int, items: int = NUM_ITEMS, impressions: int = IMPRESSIONS) -> Dataset:
    """Make a dataset in `folder` and return it.

    Args:
        folder: must exist. days: days of training, of `EVENTS_A_DAY` events each. items: number of items.
        impressions: per request.
    """
    log = {
        "kind": "synthetic", "num_items": items, "num_users": NUM_USERS, "max_history": MAX_HISTORY,
        "train_days": days, "test_days": 1, "events_per_day": EVENTS_A_DAY,
        "impressions_per_request": impressions,
        "embeddings": EMBEDDINGS, "categoricals": {"category": CATEGORIES},
    }  # fmt: skip
    config = folder / "dataset.yaml"
    config.write_text(to_yaml({"prepare": {"source": log}}), encoding="utf-8")
    write_encoder(folder / "encoder", EncoderConfig())
    inputs = [f"dataset={folder / 'tables'}", f"encoder.sid={folder / 'encoder'}"]
    stage = [sys.executable, "-m"]
    run_program([*stage, "sidestack.pipelines.prepare", "--config", str(config), "--out", str(folder / "tables")])
    named = [word for one in inputs for word in ("--input", one)]
    run_program(
        [*stage, "sidestack.encoder.materialize", "--config", str(config), *named, "--out", str(folder / "dataset")]
    )
    return read_dataset(folder / "dataset")
