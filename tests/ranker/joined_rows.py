"""Batches of joined rows of the tests' dataset, and the features of an arm on it."""

from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidestack.infra.lane import Batch
from sidestack.infra.rows import Rows
from sidestack.infra.tables import request_schema
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.features import ArmFeatures, arm_features
from tests.datasets import joined
from tests.ranker.dataset import SIDS, SPEC
from tests.ranker.training import config_with

FIRST_DAY = date(2024, 1, 1)


def features_of(arm: str) -> ArmFeatures:
    return arm_features(SPEC, RankerConfig(arm=arm), SIDS)


def first_rows(dataset: Path, rows: int = 40) -> pa.Table:
    return joined(dataset, None, FIRST_DAY, FIRST_DAY).slice(3, rows)


def batch_of(table: pa.Table, rows_per_request: int = 1) -> Batch:
    """Return a batch of joined rows; each `rows_per_request` consecutive rows share the first one's request columns."""
    rows = table.num_rows
    shared = [
        name
        for name in table.column_names
        if name in request_schema(SPEC).names[1:] or name.startswith(("history_", "user_"))
    ]
    requests = table.select(shared).take(pa.array(np.arange(0, rows, rows_per_request))).combine_chunks()
    own = table.drop_columns(shared).combine_chunks()
    return Batch(Rows(own, requests, np.arange(rows) // rows_per_request), np.arange(rows), np.arange(rows) < rows - 2)


def laid_out(**arm: object) -> ArmFeatures:
    return arm_features(SPEC, config_with(arm), SIDS)
