"""Stage `encoder`: it learns, repeats itself byte for byte, and stops everywhere when it must."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from encoder.bundle import ENCODER_FILE, WEIGHTS_FILE, load_bundle
from encoder.train import common_sample
from infra.distributed import World
from infra.errors import ConfigError, DataError, StageError
from infra.parquet import read_row_group, row_groups
from tests.distributed import run_distributed
from tests.encoder.fabricated import LOCAL, SPEC, embedding_column, train_encoder, write_dataset, write_table

GOLDEN = Path(__file__).parent / "golden_losses.json"
TEN_STEPS = {"training": {"epochs": 1, "batch_size": 64, "log_every": 1}}


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [row["train/loss"] for row in history(out) if "train/loss" in row]


def weights_and_spec(out: Path) -> bytes:
    return (out / WEIGHTS_FILE).read_bytes() + (out / ENCODER_FILE).read_bytes()


def test_ten_steps_give_the_losses_on_file(dataset: Path, tmp_path: Path) -> None:
    """A change of these numbers is a change of the training; the file is then written anew, by intent.

    Written by `python -m tests.encoder.golden`.
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


def test_the_record_has_the_curves(encoder: Path) -> None:
    rows = history(encoder)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == [5, 10, 15, 20]
    assert {"train/type/loss", "train/items_per_second", "train/learning_rate", "train/codebook"} <= set(training[0])
    epochs = [row for row in rows if "holdout/unique_share" in row]
    assert [row["step"] for row in epochs] == [10, 20]
    assert {"holdout/text_embedding/loss", "holdout/brand/top1", "holdout/entropy_bits/05"} <= set(epochs[0])


def test_the_same_config_gives_the_same_bytes(encoder: Path, dataset: Path, tmp_path: Path) -> None:
    train_encoder(LOCAL, dataset, tmp_path / "again")
    assert weights_and_spec(tmp_path / "again") == weights_and_spec(encoder)
    train_encoder(LOCAL, dataset, tmp_path / "other", {"training": {"seed": 1}})
    assert weights_and_spec(tmp_path / "other") != weights_and_spec(encoder)


def train_twice(world: World, dataset: Path, out: Path) -> tuple[str, list[list[float]]]:
    for name in ("first", "second"):
        train_encoder(world, dataset, out / name, TEN_STEPS)
    rows = 5 if world.rank == 0 else 3
    h_BH = torch.arange(rows * 2, dtype=torch.float32).view(rows, 2) + 100 * world.rank
    return load_bundle(out / "first", world.device).spec.fingerprint, common_sample(world, h_BH, 8).tolist()


def test_two_ranks_repeat_themselves_and_follow_one_rank(dataset: Path, tmp_path: Path) -> None:
    one, other = run_distributed(train_twice, dataset, tmp_path)
    assert one == other
    assert one[1] == [[0, 1], [2, 3], [4, 5], [100, 101], [102, 103], [104, 105]]  # as many rows of each rank
    assert weights_and_spec(tmp_path / "first") == weights_and_spec(tmp_path / "second")
    train_encoder(LOCAL, dataset, tmp_path / "alone", TEN_STEPS)
    # The same global batches and start: the sums are taken in another order, no more.
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
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]
    bundle = load_bundle(tmp_path / "out", LOCAL.device)
    measured = json.loads((tmp_path / "out" / "summary.json").read_text())["holdout"]["digits"]
    assert np.array(measured["histogram"]).shape == (bundle.spec.digits, bundle.spec.radix)


def with_a_nan_in_row_650(path: Path) -> Path:
    """Write the dataset with a fault in a lane that the second of two ranks reads; give the file."""
    last = write_dataset(path) / "items/part-00001.parquet"
    table = pa.concat_tables(read_row_group(group) for group in row_groups([last]))
    x_ND = np.ones((len(table), 16), np.float16)
    x_ND[250] = np.nan
    spoiled = embedding_column(x_ND, np.zeros(len(x_ND), bool))
    write_table(last, table.set_column(table.column_names.index("text_embedding"), "text_embedding", spoiled), 90)
    return last


DIVERGING = {"learning_rate": 1e30, "clip_norm": 1e30}


def failures(world: World, dataset: Path, spoiled: Path, out: Path) -> list[str]:
    with pytest.raises(DataError) as not_finite:
        train_encoder(world, dataset, out / "first", {"training": {**DIVERGING, "codebook_starts": [0]}})
    with pytest.raises((DataError, StageError)) as bad_row:
        train_encoder(world, spoiled, out / "second")
    return [str(not_finite.value), str(bad_row.value)]


def test_two_ranks_stop_together_and_say_where_it_was(dataset: Path, tmp_path: Path) -> None:
    """A loss that is not finite, then a bad row that one rank alone reads: no rank waits for the other."""
    file = with_a_nan_in_row_650(tmp_path / "spoiled")
    for not_finite, bad_row in run_distributed(failures, dataset, tmp_path / "spoiled", tmp_path / "out"):
        assert "encoder: step 1: loss or gradient is not finite" in not_finite
        for rank in (0, 1):
            assert f"rank {rank}: loss " in not_finite
        for part in ("part-00000.parquet, row group", "part-00001.parquet, row group"):
            assert part in not_finite
        assert f"{file}, row group 2" in bad_row
        assert "'text_embedding': must be finite" in bad_row
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))


def test_a_codebook_is_not_set_from_vectors_that_are_not_finite(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="step 1: latent vectors are not finite"):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"training": DIVERGING})


def test_a_hold_out_of_nothing_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holdout_share=1e-09: holds out none of the 700 items"):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"training": {"holdout_share": 1e-9}})


def test_a_signal_that_is_not_there_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"encoder.signals.colour: not a signal"):
        train_encoder(LOCAL, dataset, tmp_path / "out", {"signals": {"colour": 1.0}})
