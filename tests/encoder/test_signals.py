"""Signals: chosen by name, nulls as zeros with a mask, invalid values refused with file and row group."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.signals import SignalSpec, chosen_signals, concatenated, signal_batch, signal_check
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.parquet import RowGroup, read_row_group, row_groups
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import SPEC, embedding_column, item_table, write_table

SIGNALS = chosen_signals({}, SPEC)


def test_signals_are_all_by_default_or_chosen_by_name() -> None:
    assert SIGNALS.names == ("text_embedding", "behaviour_embedding", "type", "brand")
    assert SIGNALS.weights == {"text_embedding": 1, "behaviour_embedding": 1, "type": 0.1, "brand": 0.1}
    chosen = chosen_signals({"brand": 0.5, "text_embedding": 2}, SPEC)
    assert chosen.names == ("text_embedding", "brand")
    assert chosen.columns == ("item_id", "text_embedding", "brand")
    with pytest.raises(ConfigError, match=r"encoder.signals.colour: not a signal .* items; they have text_embedding"):
        chosen_signals({"colour": 1.0}, SPEC)


def test_a_dataset_of_other_sizes_is_refused() -> None:
    wider = SPEC.model_copy(update={"embeddings": {"text_embedding": 32, "behaviour_embedding": 8}})
    with pytest.raises(DataError, match="'text_embedding' has size 32, the encoder takes 16"):
        SIGNALS.require(wider, Path("dataset"))
    fewer = SPEC.model_copy(update={"categoricals": {}})
    with pytest.raises(DataError, match="'type' has size None"):
        SIGNALS.require(fewer, Path("dataset"))


def test_rows_become_tensors_with_nulls_masked(dataset: Path) -> None:
    table = item_table()
    groups = row_groups([file.path for file in read_dataset(dataset).files("items")])
    batch = concatenated([signal_batch(read_row_group(group, SIGNALS.columns), SIGNALS) for group in groups])
    assert len(batch) == SPEC.num_items
    for name in SPEC.embeddings:
        rows = table[name].to_pylist()
        assert batch.present[name].tolist() == [row is not None for row in rows]
        expected = np.array([row or [0.0] * SPEC.embeddings[name] for row in rows], np.float32)
        assert np.array_equal(batch.embeddings[name].numpy(), expected)
    for name in SPEC.categoricals:
        ids = table[name].to_pylist()
        assert batch.present[name].tolist() == [i is not None for i in ids]
        assert batch.categoricals[name].tolist() == [i or 0 for i in ids]
    assert (~batch.any_present).nonzero().flatten().tolist() == [17, 400, 699]


@pytest.mark.parametrize("stored", [np.float16, np.float32])
@pytest.mark.parametrize("missing", [(), (0,), (0, 1, 4), (0, 1, 2, 3, 4)])
def test_missing_embeddings_are_zeros_in_any_precision(stored: type[np.floating], missing: tuple[int, ...]) -> None:
    x_ND = np.arange(1, 5 * 16 + 1).reshape(5, 16).astype(stored)
    gone_N = np.isin(np.arange(5), missing)
    table = item_table().slice(0, 5)
    at = table.column_names.index("text_embedding")
    table = table.set_column(at, "text_embedding", embedding_column(x_ND, gone_N))
    batch = signal_batch(table, SIGNALS)
    assert batch.present["text_embedding"].tolist() == (~gone_N).tolist()
    assert batch.embeddings["text_embedding"].tolist() == np.where(gone_N[:, None], 0, x_ND).tolist()


def test_slices_of_arrow_tables_are_read_from_their_offset() -> None:
    table = item_table()
    whole, part = signal_batch(table, SIGNALS), signal_batch(table.slice(123, 50), SIGNALS)
    for name in SPEC.embeddings:
        assert torch.equal(part.embeddings[name], whole.embeddings[name][123:173])
    filtered = signal_batch(table.filter(pa.array(np.arange(SPEC.num_items) % 3 == 0)), SIGNALS)
    assert torch.equal(filtered.embeddings["text_embedding"], whole.embeddings["text_embedding"][::3])


def test_batches_are_cut_into_blocks_and_padded() -> None:
    batch = signal_batch(item_table(), SIGNALS)
    assert [len(block) for block in batch.blocks(256)] == [256, 256, 188]
    padded = next(batch.sliced(512, 700).blocks(256)).padded(256)
    assert len(padded) == 256
    assert not padded.any_present[188:].any()


def with_column(name: str, column: pa.Array) -> pa.Table:
    table = item_table()
    return table.set_column(table.column_names.index(name), name, column)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [("text_embedding", np.nan, "must be finite; holds nan"), ("behaviour_embedding", np.inf, "must be finite")],
)
def test_non_finite_embedding_is_refused(tmp_path: Path, name: str, value: float, rule: str) -> None:
    x_ND = np.ones((SPEC.num_items, SPEC.embeddings[name]), np.float16)
    x_ND[450, 3] = value
    require_refusal_of_row_450(
        tmp_path, with_column(name, embedding_column(x_ND, np.zeros(len(x_ND), bool))), name, rule
    )


def test_a_category_outside_its_range_is_refused(tmp_path: Path) -> None:
    ids_N = np.zeros(SPEC.num_items, np.int32)
    ids_N[450] = 12
    require_refusal_of_row_450(
        tmp_path, with_column("brand", pa.array(ids_N)), "brand", r"id 12 is outside the table \[0, 12\)"
    )


def require_refusal_of_row_450(tmp_path: Path, table: pa.Table, name: str, rule: str) -> None:
    path = tmp_path / "part-00000.parquet"
    write_table(path, table, row_group_rows=100)
    check = signal_check(SPEC)
    passed: list[RowGroup] = []
    with pytest.raises(DataError, match=rule) as refused:
        for group in row_groups([path]):
            check(read_row_group(group, SIGNALS.columns), group)
            passed.append(group)
    assert len(passed) == 4
    assert f"{path}, row group 4" in str(refused.value)
    assert repr(name) in str(refused.value)


def test_signal_spec_round_trips_through_json() -> None:
    assert SignalSpec.model_validate_json(SIGNALS.model_dump_json()) == SIGNALS
