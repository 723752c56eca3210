"""Rows that a later part revises are found as by a plain dictionary; without revisions no file is read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.revisions import read_revisions
from sidestack.infra.rows import FileRows
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content, write_snapshot_of
from tests.encoder.fabricated import SPEC


def items(*ids: int) -> pa.Table:
    return pa.table([pa.array(ids, pa.int64())], schema=pa.schema([pa.field("item_id", pa.int64(), nullable=False)]))


PARTS = [items(0, 1, 2, 3, 4), items(1, 3, 5, 6), items(0), items(3, 6, 7), items(8)]


def test_newest_row_of_every_item_is_found(tmp_path: Path) -> None:
    dataset = read_dataset(write_snapshot_of(tmp_path, SPEC, PARTS))
    ids_N = content(dataset, "items")["item_id"].to_numpy()
    rows_N = np.arange(len(ids_N))
    newest = dict(zip(ids_N.tolist(), rows_N.tolist(), strict=True))
    expected = [newest[item] == row for row, item in enumerate(ids_N.tolist())]
    revisions = read_revisions(dataset, "item")
    assert revisions.ids_R.tolist() == [0, 1, 3, 6]
    assert revisions.are_newest(ids_N, rows_N).tolist() == expected
    order = np.random.default_rng(0).permutation(len(ids_N))
    assert revisions.are_newest(ids_N[order], rows_N[order]).tolist() == [expected[row] for row in order]


def test_no_file_is_opened_without_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = read_dataset(write_snapshot_of(tmp_path, SPEC, [items(0, 1), items(2), items(3, 4)]))
    monkeypatch.setattr(FileRows, "read", None)
    revisions = read_revisions(dataset, "item")
    assert revisions.are_newest(np.arange(5), np.arange(5)).all()
    assert read_revisions(dataset, "user").are_newest(np.arange(3), np.arange(3)).all()
