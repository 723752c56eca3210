"""The datasets of the benchmarks: the default data as a run prepared it, and random items of any number."""

from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml

from sidestack.encoder.bundle import save_bundle
from sidestack.encoder.config import EncoderConfig, NetworkConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalBatch, SignalSpec, chosen_signals
from sidestack.infra import store
from sidestack.infra.commit import committing
from sidestack.infra.config import digest
from sidestack.infra.distributed import World
from sidestack.infra.errors import ConfigError
from sidestack.infra.manifest import is_committed
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.record import CONFIG_FILE
from sidestack.infra.snapshot import Dataset
from sidestack.infra.store import Store
from sidestack.infra.tables import DatasetSpec, item_schema
from sidestack.pipelines.prepare.contract import STORE

DIM, CATEGORIES = 64, 1000
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"), backend="gloo")
"""The world of a benchmark's own process, without a process group."""
DEFAULT_EMBEDDINGS = {"text_embedding": 384, "behaviour_embedding": 64}
DEFAULT_CATEGORICALS = {"department": 32, "category": 303, "subcategory": 2378, "brand": 2, "manufacturer": 6471}
DEFAULT_SIGNALS = SignalSpec(
    embeddings=DEFAULT_EMBEDDINGS,
    categoricals=DEFAULT_CATEGORICALS,
    weights=dict.fromkeys((*DEFAULT_EMBEDDINGS, *DEFAULT_CATEGORICALS), 1.0),
)
"""Signals with the number and sizes of the default data's."""
NETWORKS = {"default": NetworkConfig(), "1,024 units": NetworkConfig(embedding_width=256, hidden=1024, blocks=2)}
"""The networks whose speed is measured."""
_DIFFERENT_ROWS = 1 << 16
_CHUNK_ROWS = 1 << 13


def newest_dataset(runs: Path) -> Path:
    """Find the newest committed output of `prepare` for Complete Journey.

    Raises:
        ConfigError: there is none; the message has the command that makes one.
    """
    found = [path.parent for path in runs.glob(f"*/prepare/*/{CONFIG_FILE}") if _is_complete_journey(path)]
    if not found:
        raise ConfigError(
            f"{runs}: holds no prepared Complete Journey dataset; `make run` or `python -m pipelines.prepare"
            " --config configs/complete_journey.yaml --out DIR` makes one, and --dataset DIR names it"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _is_complete_journey(file: Path) -> bool:
    section = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("prepare", {})
    return is_committed(file.parent) and section.get("source", {}).get("kind") == "complete_journey"


def items_spec(rows: int) -> DatasetSpec:
    """Return the spec of a dataset of `rows` items with an embedding and a category, without users and events."""
    return DatasetSpec(
        embeddings={"embedding": DIM},
        categoricals={"category": CATEGORIES},
        user_categoricals={},
        num_items=rows,
        num_users=0,
        dense=(),
        sparse={},
        max_history=0,
        train=(date(2024, 1, 1), date(2024, 1, 1)),
        test=(date(2024, 1, 2), date(2024, 1, 2)),
        origin="random vectors, for benchmarks",
    )


def read_items(dataset: Dataset, columns: Sequence[str]) -> pa.Table:
    """Read columns of all of a dataset's items."""
    groups = row_groups([file.path for file in dataset.content_files("item")])
    return pa.concat_tables([read_row_group(group, columns) for group in groups])


def write_items(out: Path, rows: int) -> None:
    """Commit a dataset of random items as `out`; their rows go to the store next to it."""
    spec = items_spec(rows)
    schema, key = item_schema(spec), digest({"random items": rows})
    with committing(out, ALONE, stage="prepare") as staging:
        store.write_items(Store(out.parent / STORE), staging, spec, key, schema, _items(rows, schema))


def write_encoder(out: Path, config: EncoderConfig) -> None:
    """Commit an untrained encoder, with its codebook set from items, as `out`."""
    torch.manual_seed(0)
    model = VQFusion(config, chosen_signals({}, items_spec(1))).eval()
    with committing(out, ALONE, stage="encoder") as staging, torch.no_grad():
        model.quantizer.start(model.encoder(random_batch(1 << 12)), torch.Generator().manual_seed(0))
        save_bundle(staging, model, config)


def random_batch(rows: int) -> SignalBatch:
    """Return random items as tensors."""
    generator = torch.Generator().manual_seed(0)
    return SignalBatch(
        {"embedding": torch.randn(rows, DIM, generator=generator)},
        {"category": torch.randint(CATEGORIES, (rows,), generator=generator)},
        {name: torch.ones(rows, dtype=torch.bool) for name in ("embedding", "category")},
    )


def _items(rows: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield items; their vectors are 65,536 random rows, rotated, so that making them is fast."""
    rng = np.random.default_rng(0)
    some_SD = rng.standard_normal((_DIFFERENT_ROWS, DIM)).astype(np.float16)
    for first in range(0, rows, _CHUNK_ROWS):
        ids_N = np.arange(first, min(first + _CHUNK_ROWS, rows))
        x_ND = np.roll(some_SD[ids_N % _DIFFERENT_ROWS], first // _DIFFERENT_ROWS, axis=1)
        columns = [
            pa.array(ids_N),
            pa.array([f"item {i}" for i in ids_N.tolist()]),
            pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), DIM),
            pa.array((ids_N % CATEGORIES).astype(np.int32)),
        ]
        yield pa.table(columns, schema=schema)
