"""Stage `encoder`: training learns, is reproducible byte for byte, and fails on every rank at once."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from sidestack.encoder import trainer
from sidestack.encoder.bundle import ENCODER_FILE, WEIGHTS_FILE, codebook_digest, load_bundle
from sidestack.encoder.quantizers.structured import Structured, StructuredConfig
from sidestack.encoder.signals import SignalBatch, SignalSpec, signal_batch
from sidestack.encoder.trainer import common_sample
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, ConfigError, DataError, StageError, TrainingError
from sidestack.infra.snapshot import read_dataset
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    LOCAL,
    SPEC,
    edit,
    embedding_column,
    item_parts,
    item_table,
    replaced,
    train_encoder,
    write_dataset,
)

SIGNALS = (*SPEC.embeddings, *SPEC.categoricals)
GOLDEN = Path(__file__).parent / "golden_losses.json"
TEN_STEPS = {"training": {"epochs": 1, "batch_size": 64, "log_every": 1}}
# Without signal dropout, which each rank draws for its own rows.
WITHOUT_DROPOUT = {"training": {**TEN_STEPS["training"], "signal_dropout": 0.0}}


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["train/loss"] for row in history(out) if "train/loss" in row]


def weights_and_spec(out: Path) -> bytes:
    return (out / WEIGHTS_FILE).read_bytes() + (out / ENCODER_FILE).read_bytes()


def test_ten_steps_match_the_golden_losses(dataset: Path, tmp_path: Path) -> None:
    """A change of these losses is a change of the training; the golden file is then regenerated on purpose.

    It is written by `python -m tests.encoder.golden`.
    """
    train_encoder(LOCAL, dataset, tmp_path / "out", TEN_STEPS)
    found = losses(tmp_path / "out")
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
    assert len(found) == 10


def test_every_signal_is_learned_and_measured(encoder: Path, dataset: Path, tmp_path: Path) -> None:
    train_encoder(LOCAL, dataset, tmp_path / "longer", {"training": {"epochs": 25}})
    measured = json.loads((tmp_path / "longer" / "summary.json").read_text())["holdout"]
    assert set(measured["signals"]) == {*SPEC.embeddings, *SPEC.categoricals}
    for name in SPEC.embeddings:
        assert measured["signals"][name]["loss"] < 0.5  # unrelated vectors cost 1
    for name, cardinality in SPEC.categoricals.items():
        assert measured["signals"][name]["loss"] < 0.8 * math.log(cardinality)
        assert measured["signals"][name]["top1"] > 2 / cardinality
    assert np.array(measured["digits"]["histogram"]).shape == (6, 3)
    assert measured["digits"]["most_bits"] == pytest.approx(math.log2(3))
    assert 0 < measured["unique_share"] <= 1


def test_training_works_with_categorical_signals_only(dataset: Path, tmp_path: Path) -> None:
    """Without an embedding there are no axes to start a linear path from, so the model has no linear path."""
    weights = {name: 1.0 for name in SPEC.categoricals}
    train_encoder(LOCAL, dataset, tmp_path / "out", {"signals": weights, **TEN_STEPS})
    found = losses(tmp_path / "out")
    assert len(found) == 10
    assert all(math.isfinite(loss) for loss in found)


def test_history_has_the_curves_and_the_summary_has_the_budget(encoder: Path) -> None:
    budget = json.loads((encoder / "summary.json").read_text())["budget"]
    assert budget == {"by_rule": [], "rows": SPEC.num_items, "batch_size": 64, "epochs": 2, "log_every": 5}
    rows = history(encoder)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [5, 10, 15, 20]
    assert {"train/type/loss", "train/items_per_second", "train/learning_rate", "train/codebook"} <= set(training[0])
    epochs = [row for row in rows if "holdout/unique_share" in row]
    assert [row["step"] for row in epochs] == [10, 20]
    assert {"holdout/text_embedding/loss", "holdout/brand/top1", "holdout/entropy_bits/05"} <= set(epochs[0])
    assert {"holdout/perplexity/05", "holdout/dead_levels/05", "holdout/prefix_02/type/loss"} <= set(epochs[0])
    assert all(0 <= row["train/data_wait_share"] < 1 for row in training)


def test_codebook_digest_is_recorded(encoder: Path) -> None:
    """The digest is recorded after every start of the codebook (steps 0, 1, 2, 4 and 6 of 20) and every epoch."""
    noted = [row for row in history(encoder) if "codebook_sha256" in row]
    assert [(row["step"], row["after"]) for row in noted] == [
        (0, "start"), (1, "start"), (2, "start"), (4, "start"), (6, "start"), (10, "epoch"), (20, "epoch"),
    ]  # fmt: skip
    assert len({row["codebook_sha256"] for row in noted}) == 7
    last = noted[-1]["codebook_sha256"]
    assert last == codebook_digest(load_bundle(encoder, LOCAL.device).model)
    summary = json.loads((encoder / "summary.json").read_text())
    assert summary["codebook_sha256"] == last
    assert 0 <= summary["data_wait_share"] < 1


class Drifting(Structured):
    """A quantizer whose codebook drifts on rank 1, from step 12 of 20 on."""

    steps = 0

    def after_step(self, world: World) -> None:
        self.steps += 1
        if world.rank == 1 and self.steps >= 12:
            self.offset_DPKM.data += 1e-6


def drifts(world: World, dataset: Path, out: Path) -> list[str]:
    with pytest.raises(TrainingError) as initial, pytest.MonkeyPatch.context() as patch:
        seed = torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda number: seed(number + world.rank))
        train_encoder(world, dataset, out / "initial")
    with pytest.raises(TrainingError) as later, pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructuredConfig, "build", lambda config: Drifting(config))
        train_encoder(world, dataset, out / "later")
    return [str(initial.value), str(later.value)]


def test_training_stops_when_codebooks_differ_between_ranks(dataset: Path, tmp_path: Path) -> None:
    one, other = run_distributed(drifts, dataset, tmp_path)
    assert one == other
    for step, message in zip((0, 20), one, strict=True):
        found = re.fullmatch(
            rf"encoder: step {step}: the SHA-256 of the codebook is not the same on every rank: "
            r"rank 0: ([0-9a-f]{64}), rank 1: ([0-9a-f]{64})",
            message,
        )
        assert found and found[1] != found[2]


def test_a_collapsed_digit_warns_or_stops(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All signals have the same value for every item, so that items cannot be distinguished."""
    items = item_table()
    first = items.take(pa.array(np.ones(len(items), np.int64)))
    alike = write_dataset(tmp_path / "alike", item_parts(replaced(first, "item_id", items["item_id"])))
    alone = {"log_every": 1, "signal_dropout": 0.0}
    fsq = {"quantizer": FSQ}
    named = r"digit (\d) \(depth 0, group \1\) has collapsed: its use is 0\.0\d+, under collapse_threshold=0\.05"
    with pytest.raises(TrainingError, match=rf"encoder: step \d+: {named}"):
        train_encoder(LOCAL, alike, tmp_path / "out", {**fsq, "training": {**alone, "collapse": "stop"}})
    assert not (tmp_path / "out").exists()
    train_encoder(LOCAL, alike, tmp_path / "out", {**fsq, "training": {**alone, "collapse": "warn"}})
    warned = {int(digit) for digit in re.findall(named, capfd.readouterr().err)}
    collapsed = json.loads((tmp_path / "out/summary.json").read_text())["collapsed_digits"]
    assert collapsed and set(collapsed) <= warned
    train_encoder(LOCAL, dataset, tmp_path / "well", {"training": {"collapse": "stop"}})


def test_networks_in_bfloat16_train_a_codebook_in_float32(dataset: Path, tmp_path: Path) -> None:
    mixed = {"training": {"precision": "bfloat16", "log_every": 1}}
    seen = set()

    class Watching(Structured):
        def encode(self, h_BH: torch.Tensor) -> torch.Tensor:
            seen.add((self.training, h_BH.dtype, torch.is_autocast_enabled("cpu")))
            return super().encode(h_BH)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StructuredConfig, "build", lambda config: Watching(config))
        train_encoder(LOCAL, dataset, tmp_path / "mixed", mixed)
    # In training steps the input is bfloat16 and is converted; all that determines an id is float32 throughout.
    assert seen == {(True, torch.bfloat16, False), (False, torch.float32, False)}
    train_encoder(LOCAL, dataset, tmp_path / "plain", {"training": {"log_every": 1}})
    assert losses(tmp_path / "mixed") != losses(tmp_path / "plain")
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "plain"), rel=0.1)
    weights = load_file(tmp_path / "mixed" / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_same_config_gives_the_same_bytes(encoder: Path, dataset: Path, tmp_path: Path) -> None:
    train_encoder(LOCAL, dataset, tmp_path / "again")
    assert weights_and_spec(tmp_path / "again") == weights_and_spec(encoder)
    train_encoder(LOCAL, dataset, tmp_path / "other", {"training": {"seed": 1}})
    assert weights_and_spec(tmp_path / "other") != weights_and_spec(encoder)


def train_twice(world: World, dataset: Path, out: Path) -> tuple[str, list[list[float]]]:
    for name in ("first", "second"):
        train_encoder(world, dataset, out / name, WITHOUT_DROPOUT)
    rows = 5 if world.rank == 0 else 3
    h_BH = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2) + 100 * world.rank
    return load_bundle(out / "first", world.device).spec.fingerprint, common_sample(world, h_BH, 8).tolist()


def test_two_ranks_are_reproducible_and_follow_one_rank(dataset: Path, tmp_path: Path) -> None:
    one, other = run_distributed(train_twice, dataset, tmp_path)
    assert one == other
    assert one[1] == [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]  # equally many rows of each rank
    assert weights_and_spec(tmp_path / "first") == weights_and_spec(tmp_path / "second")
    train_encoder(LOCAL, dataset, tmp_path / "alone", WITHOUT_DROPOUT)
    # Global batches and start are the same; only the order of summation differs.
    assert losses(tmp_path / "first")[:3] == pytest.approx(losses(tmp_path / "alone")[:3], rel=2e-2)


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "fsq", "levels": 4, "digits": 5},
        {"kind": "structured", "levels": 3, "lines": 4, "groups": 2, "depth": 2, "group_dim": 4},
        {"kind": "structured", "levels": 2, "lines": 3, "groups": 1, "depth": 2, "group_dim": 6, "assign": "codeword"},
    ],
)
def test_other_quantizers_train(dataset: Path, tmp_path: Path, quantizer: dict[str, Any]) -> None:
    changes = {"quantizer": quantizer, "training": {"revive_every": 3}}
    train_encoder(LOCAL, dataset, tmp_path / "out", changes)
    recorded = [row for row in history(tmp_path / "out") if "train/loss" in row]
    first, *_, last = [sum(row[f"train/{name}/loss"] for name in SIGNALS) for row in recorded]
    assert last < first
    bundle = load_bundle(tmp_path / "out", LOCAL.device)
    measured = json.loads((tmp_path / "out" / "summary.json").read_text())["holdout"]["digits"]
    assert np.array(measured["histogram"]).shape == (bundle.spec.digits, bundle.spec.radix)


def with_row_650(path: Path, value: float) -> Path:
    """Write the dataset with a text embedding of `value`, in a lane that rank 1 of two reads; return the file."""

    def spoil(rows: pa.Table) -> pa.Table:
        x_ND = np.ones((len(rows), 16), np.float16)
        x_ND[250] = value
        return replaced(rows, "text_embedding", embedding_column(x_ND, np.zeros(len(x_ND), bool)))

    file, _ = edit(write_dataset(path), "items", spoil, "part=00001")
    return file


FSQ = {"kind": "fsq", "levels": 3, "digits": 4}
DIVERGING = {"learning_rate": 1e30, "clip_norm": 1e30}


def failures(world: World, dataset: Path, spoiled: Path, out: Path) -> list[str]:
    batches = itertools.count()

    def with_a_nan(table: pa.Table, signals: SignalSpec) -> SignalBatch:
        """Insert a NaN after the check of the rows read, on one rank only, in the second epoch's first batch."""
        batch = signal_batch(table, signals)
        if world.rank == 1 and next(batches) == 10:
            batch.embeddings["text_embedding"][0] = torch.nan
            batch.present["text_embedding"][0] = True
        return batch

    with pytest.raises(DataError) as everywhere:
        train_encoder(
            world, dataset, out / "first", {"quantizer": FSQ, "training": {**DIVERGING, "codebook_starts": [0]}}
        )
    with pytest.raises(DataError) as on_one, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "signal_batch", with_a_nan)
        train_encoder(world, dataset, out / "second", {"training": {"codebook_starts": []}})
    with pytest.raises((DataError, StageError)) as bad_row:
        train_encoder(world, spoiled, out / "third")
    return [str(everywhere.value), str(on_one.value), str(bad_row.value)]


def test_non_finite_values_raise_on_both_ranks_and_name_the_place(dataset: Path, tmp_path: Path) -> None:
    """Losses are not finite on both ranks, then on one; then only one rank reads a bad row. No rank hangs."""
    spoiled = with_row_650(tmp_path / "spoiled", np.nan)
    for everywhere, on_one, bad_row in run_distributed(failures, dataset, tmp_path / "spoiled", tmp_path / "out"):
        assert "encoder: step 1: loss or gradient is not finite" in everywhere
        for rank in (0, 1):
            assert f"rank {rank}: {dataset}/store/items/part=00000/" in everywhere
        assert re.search("loss of signals 'text_embedding', .* is nan|latent vectors are not finite", everywhere)
        file = r"/items/part=0000\d/\w{16}/part-0000\d\.parquet"
        place = rf"{file}, row group \d, 1 rows from its row \d+ on: loss of signal 'text_emb"
        assert re.match(rf"encoder: step 10: loss or gradient is not finite; rank 1: .*{place}", on_one)
        assert "rank 0" not in on_one
        assert f"{spoiled}, row group 2" in bad_row
        assert "'text_embedding': must be finite" in bad_row
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_non_finite_gradient_is_named_in_the_error(dataset: Path, tmp_path: Path) -> None:
    def spoiled(world: World, parameters: Iterable[torch.nn.Parameter]) -> None:
        *_, last = (parameter for parameter in parameters if parameter.grad is not None)
        assert last.grad is not None
        last.grad[0] = torch.nan

    with pytest.raises(DataError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "average_gradients", spoiled)
        train_encoder(LOCAL, dataset, tmp_path / "out")
    assert "the gradient of decoder." in str(error.value)
    assert "the gradient of quantizer." not in str(error.value)


def next_random(world: World, dataset: Path, out: Path) -> float:
    train_encoder(world, dataset, out, {"training": {"epochs": 1, "signal_dropout": 0.0}})
    return torch.rand(()).item()


def test_ranks_draw_different_random_numbers(dataset: Path, tmp_path: Path) -> None:
    first, second = run_distributed(next_random, dataset, tmp_path / "out")
    assert first != second


def test_codebook_start_refuses_non_finite_latent_vectors(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="step 1: latent vectors are not finite"):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"training": DIVERGING})


def test_empty_holdout_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holdout_share=1e-09, .*: hold out none of the 700 items on 1 "):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"training": {"holdout_share": 1e-9}})


def test_unknown_signal_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder.signals.colour: not a signal"):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"signals": {"colour": 1.0}})


def test_only_the_newest_row_of_a_revised_item_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two later parts revise items, some of them twice; the rows of an item differ in their signals."""
    items = item_table()
    parts = item_parts()
    for ids in (np.arange(0, 699, 3), np.arange(0, 699, 6)):
        parts.append(replaced(items.take(pa.array(ids + 1)), "item_id", pa.array(ids)))
    parts[3] = replaced(parts[3], "brand", pa.nulls(len(parts[3]), pa.int32()))
    read: list[tuple[int, int | None]] = []

    def recording(table: pa.Table, signals: SignalSpec) -> SignalBatch:
        read.extend(zip(table["item_id"].to_pylist(), table["brand"].to_pylist(), strict=True))
        return signal_batch(table, signals)

    for module in ("trainer", "holdout"):
        monkeypatch.setattr(f"sidestack.encoder.{module}.signal_batch", recording)
    training = {"epochs": 1, "batch_size": 4, "lanes": 1, "checkpoint_every": 0}
    train_encoder(LOCAL, write_dataset(tmp_path / "dataset", parts), tmp_path / "out", {"training": training})
    newest = dict(zip(items["item_id"].to_pylist(), items["brand"].to_pylist(), strict=True))
    for part in parts[2:]:
        newest |= dict(zip(part["item_id"].to_pylist(), part["brand"].to_pylist(), strict=True))
    seen = dict(read)
    assert all(newest[item] == brand for item, brand in read)
    assert len(seen) > 690  # all but a last partial batch


def test_an_altered_partition_is_refused_by_every_rank(dataset: Path, tmp_path: Path) -> None:
    spoiled = shutil.copytree(dataset, tmp_path / "spoiled")
    file = read_dataset(spoiled).files("items")[-1].path
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)
    assert [f"{file}: SHA-256" in reason for reason in run_distributed(refusals, spoiled, tmp_path / "out")] == [
        True,
        True,
    ]
    assert not (tmp_path / "out").exists()


def refusals(world: World, dataset: Path, out: Path) -> str:
    with pytest.raises((CommitError, StageError)) as refused:
        train_encoder(world, dataset, out)
    return str(refused.value)
