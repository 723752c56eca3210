"""Signals read by id are those of the newest row of each id, in the requested order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.newest import newest_signals
from sidestack.encoder.signals import chosen_signals, signal_batch
from sidestack.infra.errors import DataError
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import SPEC, item_table, write_dataset


def test_newest_row_of_each_id_is_read_in_the_order_of_the_ids(tmp_path: Path) -> None:
    """Of three parts, the second revises ids 5 and 399 and adds items, the third revises 5 and 410 and adds none."""
    items = item_table()
    of_id = dict(enumerate(range(len(items))))  # id -> row of `items` whose signals it has now
    parts = [items.slice(0, 400)]
    for revised, new in (((5, 399), 300), ((5, 410), 0)):
        rows = [of_id[one] + 20 for one in revised]
        of_id |= dict(zip(revised, rows, strict=True))
        changed = items.take(rows).set_column(0, items.schema.field(0), pa.array(revised))
        parts.append(pa.concat_tables([changed, items.slice(400, new)]))
    dataset = read_dataset(write_dataset(tmp_path / "dataset", parts))
    signals = chosen_signals({}, SPEC)
    ids = [699, 5, 0, 410, 399, 5, 411, 400]
    found = newest_signals(dataset, signals, np.array(ids))
    wanted = signal_batch(items.take([of_id[one] for one in ids]), signals)
    for part in ("embeddings", "categoricals", "present"):
        for name, values in getattr(wanted, part).items():
            assert torch.equal(getattr(found, part)[name], values)
    with pytest.raises(DataError, match="item 700: is not in"):
        newest_signals(dataset, signals, np.array([3, 700]))
