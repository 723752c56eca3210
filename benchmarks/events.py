"""A ranking dataset for benchmarks, of any size: a synthetic log whose items have SIDs of an encoder never trained.

Made by the stages themselves, `pipelines.prepare` and `encoder.materialize`. Speed does not depend on what the ids are.
"""

import sys
from pathlib import Path

from sidestack.benchmarks.items import CATEGORIES, DIM, write_encoder
from sidestack.benchmarks.timing import run_program
from sidestack.encoder.config import EncoderConfig
from sidestack.infra.config import to_yaml
from sidestack.infra.snapshot import Dataset, read_dataset

NUM_ITEMS, NUM_USERS, MAX_HISTORY = 92_331, 2_469, 32
"""Those of the default data, Complete Journey."""
IMPRESSIONS = 22
"""Impressions of a request, as many as a basket of the default data has on average."""
EVENTS_A_DAY = 8192
EMBEDDINGS = {"embedding": DIM, "text_embedding": 384}
"""As wide as the default data's. The encoder takes the first; `dense` takes both."""


def write_events(folder: Path, days: int, items: int = NUM_ITEMS, impressions: int = IMPRESSIONS) -> Dataset:
    """Make a dataset in `folder` and return it.

    Args:
        folder: must be there. days: of training, of `EVENTS_A_DAY` events. items: how many there are.
        impressions: of a request.
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
