"""Training started from an earlier encoder: the network trains, the codebook is frozen, and a misfit is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sidestack.encoder.bundle import (
    ENCODER_FILE,
    WEIGHTS_FILE,
    EncoderBundle,
    codebook_digest,
    load_bundle,
    network_digest,
)
from sidestack.encoder.signals import signal_batch
from sidestack.infra.commit import committing
from sidestack.infra.errors import ConfigError, DataError, SpecError
from sidestack.infra.manifest import read_manifest
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tracking import RunLog
from tests.datasets import content
from tests.distributed import run_distributed
from tests.encoder.fabricated import (
    ENCODER,
    LOCAL,
    SPEC,
    embedding_column,
    item_parts,
    item_table,
    merged,
    replaced,
    train_encoder,
    write_dataset,
)
from tests.encoder.quantizers.kinds import KINDS
from tests.encoder.test_resume import EVERY_STEP, Stopped, StoppingLog, require_equal

CPU = torch.device("cpu")
ONCE: dict[str, Any] = {"training": {"epochs": 1, "revive_every": 3}}


@pytest.fixture(scope="module")
def refreshed(dataset: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refreshed") / "encoder"
    train_encoder(LOCAL, dataset, out, ONCE, start=encoder)
    return out


def shifted_items(number: int = 200) -> pa.Table:
    """Return items that follow the first ones, from another distribution: their embeddings are reversed."""
    rows = item_table().slice(0, number)
    for name, dim in SPEC.embeddings.items():
        x_ND = np.array([row or [0.0] * dim for row in rows[name].to_pylist()], np.float16)
        rows = replaced(rows, name, embedding_column(x_ND[:, ::-1].copy(), rows[name].is_null().to_numpy()))
    return replaced(rows, "item_id", pa.array(np.arange(number) + SPEC.num_items))


def mean_loss(bundle: EncoderBundle, items: pa.Table) -> float:
    batch = signal_batch(items, bundle.signals)
    with torch.inference_mode():
        losses_KB = bundle.model.row_losses(batch, bundle.model.reconstruct(bundle.model.digits(batch)))
    return float((bundle.model.weights_K @ losses_KB).mean())


@pytest.mark.parametrize("name", KINDS)
def test_codebook_stays_bit_identical_while_the_network_trains(dataset: Path, tmp_path: Path, name: str) -> None:
    changes = {**ONCE, "quantizer": KINDS[name]}
    train_encoder(LOCAL, dataset, tmp_path / "first", changes)
    train_encoder(LOCAL, dataset, tmp_path / "second", changes, start=tmp_path / "first")
    first, second = (load_bundle(tmp_path / out, CPU) for out in ("first", "second"))
    assert codebook_digest(second.model) == codebook_digest(first.model)
    assert network_digest(second.model) != network_digest(first.model)
    assert second.spec == first.spec
    assert second.revision != first.revision
    assert json.loads((tmp_path / "second/summary.json").read_text())["revived_lines"] == 0


def test_refresh_lowers_the_loss_of_new_items(tmp_path: Path, encoder: Path) -> None:
    new = shifted_items()
    grown = write_dataset(tmp_path / "grown", [*item_parts(), new])
    assert content(read_dataset(grown), "items").num_rows == 900
    train_encoder(LOCAL, grown, tmp_path / "out", {"training": {"epochs": 8}}, start=encoder)
    before, after = (mean_loss(load_bundle(path, CPU), new) for path in (encoder, tmp_path / "out"))
    assert after < 0.9 * before


def test_refresh_starts_from_the_earlier_weights(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    """With a learning rate near zero the weights stay: no linear path or codebook is initialised again."""
    low_rate = {"training": {"epochs": 1, "learning_rate": 1e-9}}
    train_encoder(LOCAL, dataset, tmp_path / "out", low_rate, start=encoder)
    for name, before in load_file(encoder / WEIGHTS_FILE).items():
        torch.testing.assert_close(load_file(tmp_path / "out" / WEIGHTS_FILE)[name], before, atol=1e-6, rtol=0)


def test_bundle_records_what_it_was_refreshed_from(
    dataset: Path, encoder: Path, refreshed: Path, tmp_path: Path
) -> None:
    train_encoder(LOCAL, dataset, tmp_path / "again", ONCE, start=refreshed)
    first, second, third = (load_bundle(path, CPU) for path in (encoder, refreshed, tmp_path / "again"))
    assert first.lineage == (first.spec.fingerprint,)
    assert third.lineage == (first.revision, second.revision, third.revision)
    assert len(set(third.lineage)) == 3
    assert first.spec == second.spec == third.spec
    described = json.loads((tmp_path / "again" / ENCODER_FILE).read_text())
    assert described["refreshed_from"] == [first.revision, second.revision]
    facts = read_manifest(tmp_path / "again").facts
    assert (facts["fingerprint"], facts["revision"]) == (first.spec.fingerprint, third.revision)
    summary = json.loads((tmp_path / "again/summary.json").read_text())
    assert summary["refreshed_from"] == [first.revision, second.revision]


def test_altered_weights_and_a_foreign_fingerprint_are_refused(refreshed: Path, tmp_path: Path) -> None:
    altered, borrowed = (Path(shutil.copytree(refreshed, tmp_path / name)) for name in ("altered", "borrowed"))
    weights = load_file(altered / WEIGHTS_FILE)
    weights["encoder.fuse.0.weight"].view(-1)[0] += 1e-3
    save_file(weights, altered / WEIGHTS_FILE)
    with pytest.raises(SpecError, match="fingerprint of these weights is"):
        load_bundle(altered, CPU)
    described = json.loads((borrowed / ENCODER_FILE).read_text())
    described["spec"]["fingerprint"] = "ab" * 32
    (borrowed / ENCODER_FILE).write_text(json.dumps(described))
    with pytest.raises(SpecError, match=r"the SIDs have fingerprint abab.*, the encoder that began the generation is"):
        load_bundle(borrowed, CPU)


def test_incompatible_encoder_is_refused_listing_all_differences(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    changes = {
        "signals": {"text_embedding": 1.0, "brand": 0.1},
        "network": {"hidden": 16},
        "quantizer": {"kind": "structured", "groups": 2, "depth": 2, "group_dim": 4, "levels": 4},
    }
    with pytest.raises(ConfigError, match="the codebook can only be kept") as refused:
        train_encoder(LOCAL, dataset, tmp_path / "out", changes, start=encoder)
    assert str(refused.value).split("; ")[1:] == [
        "encoder.signals: text_embedding, behaviour_embedding, type, brand there, text_embedding, brand here",
        "dimensions of behaviour_embedding: 8 there, none here",
        "values of type: 5 there, none here",
        "encoder.network.hidden: 32 there, 16 here",
        "encoder.quantizer.levels: 3 there, 4 here",
        "encoder.quantizer.depth: 3 there, 2 here",
    ]
    users = {"entity": "user", "training": {"holdout_share": 0.3, "batch_size": 8}}
    with pytest.raises(ConfigError, match=r"encoder\.entity: item there, user here"):
        train_encoder(LOCAL, dataset, tmp_path / "out", users, start=encoder)
    with pytest.raises(DataError, match="not an encoder bundle"):
        train_encoder(LOCAL, dataset, tmp_path / "out", start=dataset)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["dpca", "lines", "rqvae_ema"])
def test_a_refresh_resumes_bit_for_bit(dataset: Path, tmp_path: Path, kind: str) -> None:
    changes = {**EVERY_STEP, "quantizer": KINDS[kind]}
    train_encoder(LOCAL, dataset, tmp_path / "first", {**changes, "training": {"epochs": 1}})
    with pytest.raises(Stopped):
        train_encoder(LOCAL, dataset, tmp_path / "resumed", changes, StoppingLog, start=tmp_path / "first")
    for name in ("resumed", "whole"):
        train_encoder(LOCAL, dataset, tmp_path / name, changes, start=tmp_path / "first")
    require_equal(tmp_path / "resumed", tmp_path / "whole")
    assert (tmp_path / "resumed" / ENCODER_FILE).read_bytes() == (tmp_path / "whole" / ENCODER_FILE).read_bytes()


def test_two_ranks_refresh_to_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    changes = {**ONCE, "quantizer": KINDS["rqvae_ema"]}
    train_encoder(LOCAL, dataset, tmp_path / "first", changes)
    # Training fails if the ranks' weights differ.
    run_distributed(train_encoder, dataset, tmp_path / "second", changes, RunLog, tmp_path / "first", world_size=2)
    first, second = (load_bundle(tmp_path / out, CPU) for out in ("first", "second"))
    assert codebook_digest(second.model) == codebook_digest(first.model)
    assert network_digest(second.model) != network_digest(first.model)


@pytest.mark.slow
def test_command_line_accepts_the_encoder_to_start_from(encoder: Path, tmp_path: Path) -> None:
    dataset, config, out = tmp_path / "dataset", tmp_path / "run.yaml", tmp_path / "out"
    with committing(dataset, LOCAL, stage="prepare") as staging:
        write_dataset(staging)
    config.write_text(yaml.safe_dump({"encoder": merged(ENCODER, ONCE)}))
    command = [sys.executable, "-m", "sidestack.encoder.train", "--config", str(config), "--out", str(out)]
    command += ["--input", f"dataset={dataset}", "--input", f"start={encoder}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"starts from \S+, revision [0-9a-f]{12}; codebook frozen", ended.stderr)
    assert read_manifest(out).inputs["start"] == read_manifest(encoder).digest
    assert load_bundle(out, CPU).lineage[0] == load_bundle(encoder, CPU).revision
