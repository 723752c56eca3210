"""Stage `materialize` refuses bad inputs on every rank, names the place, and leaves no output."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, ConfigError, DataError, SpecError, StageError
from sidestack.infra.snapshot import read_dataset
from tests.distributed import run_distributed
from tests.encoder.fabricated import DAYS, LOCAL, edit, embedding_column, materialize_dataset, replaced
from tests.encoder.sid_tables import copied, load_bundle_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("table", "column"), [("items", "brand"), ("events", "item_id"), ("requests", "history_item_ids")]
)
def test_missing_column_is_named_in_the_error(
    fresh: Path, encoder: Path, tmp_path: Path, table: str, column: str
) -> None:
    file, *_ = edit(fresh, table, lambda rows: rows.drop_columns([column]))
    with pytest.raises(DataError, match=rf"{file}, row group 0: column '{column}' is missing"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")


def test_a_codebook_of_another_encoder_is_refused(materialized: Path) -> None:
    spec = load_bundle_spec(materialized)
    with pytest.raises(SpecError, match=r"sid.safetensors: fingerprint .*the SIDs 'sid' have abab"):
        read_codebook(materialized, spec.model_copy(update={"fingerprint": "ab" * 32}))
    with pytest.raises(DataError, match="cannot be read as the codebook of the SIDs 'other'"):
        read_codebook(materialized, spec.model_copy(update={"name": "other"}))


def test_prefix_lengths_of_an_unknown_encoder_are_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths.other: no encoder of this name; given are sid"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"prefix_lengths": {"other": [2]}})


def test_a_prefix_longer_than_the_sid_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prefix_lengths \(5, 10\) must rise within 1..6"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out", {"prefix_lengths": {"sid": [5, 10]}})


def test_a_dataset_with_sids_of_that_name_is_refused(materialized: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has SIDs 'sid' already"):
        materialize_dataset(LOCAL, materialized, encoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_altered_encoder_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(encoder, tmp_path / "altered"))
    text = (altered / "encoder.json").read_text()
    found = load_bundle(encoder, CPU).spec.fingerprint
    (altered / "encoder.json").write_text(text.replace(found, "0" * 64))
    with pytest.raises(SpecError, match="fingerprint of these weights"):
        materialize_dataset(LOCAL, fresh, altered, tmp_path / "out")


def alter(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


@pytest.mark.parametrize("how", ["altered", "gone", "another"])
@pytest.mark.parametrize("table", ["items", "events", "requests"])
def test_partition_that_differs_from_the_snapshot_is_refused_and_leaves_no_files(
    fresh: Path, encoder: Path, tmp_path: Path, table: str, how: str
) -> None:
    dataset = read_dataset(fresh)
    *_, entry = dataset.partitions(table)
    folder = dataset.store / entry.path
    if how == "altered":
        alter(folder / entry.files[0].name)
    elif how == "gone":
        shutil.rmtree(folder)
    else:  # a complete partition, but with other rows than those listed
        (other, *_) = dataset.partitions(table)
        shutil.rmtree(folder)
        shutil.copytree(dataset.store / other.path, folder)
    with pytest.raises(CommitError, match=re.escape(str(folder))):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    made = {file.parent for file in (fresh / "store/sids").rglob("*.parquet")}
    assert all((place / "manifest.json").exists() for place in made)
    assert not any(table in place.parts and entry.slice in place.parts for place in made)


def failures(world: World, encoder: Path, out: Path, *datasets: Path) -> list[str]:
    messages = []
    for dataset in datasets:
        with pytest.raises((CommitError, DataError, StageError)) as refused:
            materialize_dataset(world, dataset, encoder, out)
        messages.append(str(refused.value))
    return messages


def with_value(column: pa.ChunkedArray, row: int, value: Any) -> pa.Array:
    values = column.to_pylist()
    values[row] = value
    return pa.array(values, column.type)


def test_invalid_rows_raise_on_both_ranks_and_leave_no_output(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    shown, remembered, altered = (copied(fresh, tmp_path / name) for name in ("shown", "remembered", "altered"))

    def show_an_unknown_item(rows: pa.Table) -> pa.Table:
        return replaced(rows, "item_id", with_value(rows["item_id"], 100, 700))

    def add_an_unknown_item_to_a_history(rows: pa.Table) -> pa.Table:
        return replaced(rows, "history_item_ids", with_value(rows["history_item_ids"], 60, [3, -1]))

    (shown_file,) = edit(shown, "events", show_an_unknown_item, f"date={DAYS[1]}")
    (remembered_file,) = edit(remembered, "requests", add_an_unknown_item_to_a_history, f"date={DAYS[1]}")
    items = read_dataset(altered).files("items")[-1].path
    alter(items)
    out = tmp_path / "out" / "tables"
    for about_item, about_history, about_file in run_distributed(failures, encoder, out, shown, remembered, altered):
        rule = r"is outside the table \[0, 700\)"
        assert re.search(rf"{shown_file}, row group [1-9]: column 'item_id': id 700 {rule}", about_item)
        history = rf"{remembered_file}, row group [1-9]: column 'history_item_ids': id -1 {rule}"
        assert re.search(history, about_history)
        assert f"{items}: SHA-256" in about_file
    assert list((tmp_path / "out").iterdir()) == []


def test_a_nan_in_an_embedding_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    def spoil(rows: pa.Table) -> pa.Table:
        x_ND = np.ones((len(rows), 16), np.float16)
        x_ND[200, 5] = np.nan
        return replaced(rows, "text_embedding", embedding_column(x_ND, np.zeros(len(x_ND), bool)))

    file, _ = edit(fresh, "items", spoil, "part=00001")
    with pytest.raises(DataError, match="must be finite") as refused:
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
    assert f"{file}, row group 2: column 'text_embedding'" in str(refused.value)


def test_a_dataset_of_other_signals_is_refused(fresh: Path, encoder: Path, tmp_path: Path) -> None:
    spec = json.loads((fresh / "dataset.json").read_text())
    spec["categoricals"]["brand"] = 13
    (fresh / "dataset.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="signal 'brand' has size 13, the encoder takes 12"):
        materialize_dataset(LOCAL, fresh, encoder, tmp_path / "out")
