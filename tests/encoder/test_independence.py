"""A SID depends only on its item's signals: not on the other items, their order or their number."""

import shutil
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.config import EncoderConfig, NetworkConfig
from sidestack.encoder.encoding import BLOCK_ROWS
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalBatch, SignalSpec, signal_batch
from sidestack.infra.snapshot import read_dataset
from tests.datasets import content
from tests.encoder.fabricated import (
    DAYS,
    LOCAL,
    SPEC,
    events,
    item_parts,
    item_table,
    materialize_dataset,
    replaced,
    write_dataset,
)


def write_items(path: Path, table: pa.Table, row_group_rows: int) -> Path:
    """Write a dataset whose items are these rows, renumbered; its events show only the first ten."""
    numbered = replaced(table, "item_id", pa.array(np.arange(len(table))))
    parts = item_parts(numbered)
    return write_dataset(path, parts, {day: few_events(day) for day in DAYS}, row_group_rows=row_group_rows)


def few_events(day: date) -> pa.Table:
    table = events(day, rows=10)
    history = table["history_item_ids"].combine_chunks()
    few = pa.array(history.flatten().to_numpy() % 10)
    columns = {
        "item_id": pa.array(table["item_id"].to_numpy() % 10),
        "history_item_ids": pa.ListArray.from_arrays(history.offsets, few),
    }
    for name, column in columns.items():
        table = replaced(table, name, column)
    return table


def sids(path: Path) -> list[int | None]:
    dataset = read_dataset(path)
    found: list[int | None] = content(dataset, dataset.snapshot.sids["sid"].table("sid", "items"))["sid"].to_pylist()
    return found


@pytest.mark.parametrize("row_group_rows", [90, 300])
def test_item_keeps_its_sid_when_other_items_change(
    dataset: Path, encoder: Path, tmp_path: Path, row_group_rows: int
) -> None:
    shutil.copytree(dataset, tmp_path / "dataset")
    materialize_dataset(LOCAL, tmp_path / "dataset", encoder, tmp_path / "all")
    expected = sids(tmp_path / "all")
    rng = np.random.default_rng(row_group_rows)
    # A third of the items in another order, among new items that mix the signals of two items.
    chosen = rng.permutation(SPEC.num_items)[: SPEC.num_items // 3]
    table = item_table()
    other = table.take(pa.array(rng.permutation(SPEC.num_items)))
    new_items = table.set_column(2, table.schema.field(2), other.column(2)).slice(0, 300)
    order = rng.permutation(len(chosen) + len(new_items))
    mixed = pa.concat_tables([table.take(pa.array(chosen)), new_items]).take(pa.array(order))
    write_items(tmp_path / "few", mixed, row_group_rows)
    materialize_dataset(LOCAL, tmp_path / "few", encoder, tmp_path / "few-sids")
    found = sids(tmp_path / "few-sids")
    place = np.argsort(order)[: len(chosen)]
    assert [found[at] for at in place] == [expected[item] for item in chosen]
    assert len(set(found)) > 20


def wide_network() -> VQFusion:
    """Return a network whose sizes are no multiples of a vector register, where kernels treat edges separately."""
    signals = SignalSpec(
        embeddings={"text": 100, "image": 33}, categoricals={"type": 30}, weights={"text": 1, "image": 1, "type": 1}
    )
    torch.manual_seed(0)
    network = NetworkConfig(embedding_width=77, categorical_width=13, hidden=131)
    return VQFusion(EncoderConfig(network=network), signals).eval()


def random_batch(signals: SignalSpec, rng: torch.Generator) -> SignalBatch:
    rows = BLOCK_ROWS
    return SignalBatch(
        {name: torch.randn(rows, dim, generator=rng) for name, dim in signals.embeddings.items()},
        {name: torch.randint(number, (rows,), generator=rng) for name, number in signals.categoricals.items()},
        {name: torch.rand(rows, generator=rng) < 0.8 for name in signals.names},
    )


def with_other_rows(
    batch: SignalBatch, others: SignalBatch, order_B: torch.Tensor, kept_B: torch.Tensor
) -> SignalBatch:
    """Permute the batch's rows, and replace those that are not kept by rows of `others`."""

    def chosen(part: str) -> dict[str, torch.Tensor]:
        of, instead = getattr(batch, part), getattr(others, part)
        wide = {name: kept_B.view(-1, *[1] * (x.ndim - 1)) for name, x in of.items()}
        return {name: torch.where(wide[name], x[order_B], instead[name]) for name, x in of.items()}

    return SignalBatch(chosen("embeddings"), chosen("categoricals"), chosen("present"))


@pytest.mark.parametrize("network", ["trained", "wide"])
def test_latent_vectors_do_not_depend_on_the_rest_of_the_block(encoder: Path, network: str) -> None:
    """Compare latent vectors bit by bit, not only digits: a difference of one bit rarely changes a digit."""
    model = load_bundle(encoder, LOCAL.device).model if network == "trained" else wide_network()
    rng = torch.Generator().manual_seed(1)
    batch = random_batch(model.signals, rng)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as materialize does
    try:
        with torch.inference_mode():
            h_BH, digits_BN = model.encoder(batch), model.digits(batch)
            for share in (0.02, 0.5, 1.0) * 5:
                order_B = torch.randperm(BLOCK_ROWS, generator=rng)
                kept_B = torch.rand(BLOCK_ROWS, generator=rng) < share
                among_others = with_other_rows(batch, random_batch(model.signals, rng), order_B, kept_B)
                assert torch.equal(model.encoder(among_others)[kept_B], h_BH[order_B[kept_B]])
                assert torch.equal(model.digits(among_others)[kept_B], digits_BN[order_B[kept_B]])
    finally:
        torch.set_num_threads(threads)


def test_signal_batch_of_one_row_equals_its_row_in_a_larger_batch(dataset: Path, encoder: Path) -> None:
    """The conversion of a table to tensors treats each row independently, even if other rows have nulls."""
    signals = load_bundle(encoder, LOCAL.device).signals
    whole = signal_batch(item_table(), signals)
    for row in range(0, SPEC.num_items, 53):
        alone = signal_batch(item_table().slice(row, 1), signals)
        for part in ("embeddings", "categoricals", "present"):
            for name, x in getattr(alone, part).items():
                assert torch.equal(x[0], getattr(whole, part)[name][row])
