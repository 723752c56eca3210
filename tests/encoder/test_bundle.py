"""The encoder bundle: round trip of weights and spec, and a fingerprint over exactly what determines SIDs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidestack.encoder.bundle import ENCODER_FILE, WEIGHTS_FILE, fingerprint, load_bundle
from sidestack.infra.config import VERSION
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.manifest import read_manifest

CPU = torch.device("cpu")


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


def change_weight(bundle: Path, name: str) -> None:
    weights = load_file(bundle / WEIGHTS_FILE)
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, bundle / WEIGHTS_FILE)


def test_bundle_round_trip_preserves_weights_and_spec(encoder: Path) -> None:
    bundle = load_bundle(encoder, CPU)
    assert not bundle.model.training
    assert bundle.spec.fingerprint == fingerprint(bundle.model, bundle.config)
    assert bundle.spec.fingerprint == read_manifest(encoder).facts["fingerprint"]
    assert (bundle.spec.digits, bundle.spec.depth, bundle.spec.groups) == (6, 3, 2)
    assert len(bundle.spec.steps) == 6
    for name, tensor in load_file(encoder / WEIGHTS_FILE).items():
        assert torch.equal(bundle.model.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["quantizer.offset_DPKM", "quantizer.log_step_DPK", "encoder.fuse.0.weight"])
def test_changed_weights_are_refused(copy: Path, name: str) -> None:
    change_weight(copy, name)
    with pytest.raises(SpecError, match=r"fingerprint of these weights is [0-9a-f]{16}…, encoder.json says"):
        load_bundle(copy, CPU)


def test_fingerprint_does_not_cover_decoder_weights(copy: Path, encoder: Path) -> None:
    change_weight(copy, "decoder.unmix.0.weight")
    with pytest.raises(DataError, match="SHA-256 is not encoder.json's: the file was altered"):
        load_bundle(copy, CPU)
    description = json.loads((copy / ENCODER_FILE).read_text())
    del description["weights"]  # earlier versions wrote no digest of the weights
    (copy / ENCODER_FILE).write_text(json.dumps(description))
    assert load_bundle(copy, CPU).spec == load_bundle(encoder, CPU).spec


def test_fingerprint_covers_only_settings_that_determine_ids(encoder: Path) -> None:
    bundle = load_bundle(encoder, CPU)
    other = bundle.config.quantizer.model_copy(update={"assign": "codeword"})
    changed = bundle.config.model_copy(update={"quantizer": other})
    assert fingerprint(bundle.model, changed) != bundle.spec.fingerprint
    training = bundle.config.training.model_copy(update={"seed": 99})
    trained_alike = bundle.config.model_copy(update={"training": training})
    assert fingerprint(bundle.model, trained_alike) == bundle.spec.fingerprint


def test_fingerprint_covers_decoder_and_signal_weights_when_digits_are_searched(encoder: Path) -> None:
    bundle = load_bundle(encoder, CPU)
    model = bundle.model

    def of(rounds: int) -> str:
        search = bundle.config.search.model_copy(update={"rounds": rounds})
        return fingerprint(model, bundle.config.model_copy(update={"search": search}))

    rounded, once, twice = (of(rounds) for rounds in (0, 1, 2))
    assert len({rounded, once, twice}) == 3
    model.signals = model.signals.model_copy(update={"weights": {name: 2.0 for name in model.signals.names}})
    assert of(0) == rounded
    reweighted = of(1)
    assert reweighted != once
    with torch.no_grad():
        model.get_parameter("decoder.unmix.0.weight")[0, 0] += 1e-3
    assert of(0) == rounded
    assert of(1) != reweighted


def test_invalid_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an encoder bundle"):
        load_bundle(tmp_path / "nowhere", CPU)
    description = json.loads((copy / ENCODER_FILE).read_text())
    description["config"]["network"]["hidden"] = 16
    (copy / ENCODER_FILE).write_text(json.dumps(description))
    with pytest.raises(DataError, match="does not fit encoder.json"):
        load_bundle(copy, CPU)
    (copy / WEIGHTS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="not an encoder bundle"):
        load_bundle(copy, CPU)


def rewrite(bundle: Path, changes: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite `encoder.json` as another version would have written it, including its fingerprint."""
    model = load_bundle(bundle, CPU).model
    description = json.loads((bundle / ENCODER_FILE).read_text())
    changes(description)
    description["spec"]["fingerprint"] = fingerprint(model, description["config"])
    (bundle / ENCODER_FILE).write_text(json.dumps(description))


def test_bundle_without_a_newer_field_loads_with_its_default(copy: Path, encoder: Path) -> None:
    def leave_out(description: dict[str, Any]) -> None:
        del description["version"], description["spec"]["bound"]
        del description["config"]["training"]["precision"]
        del description["config"]["network"]["blocks"]  # determines ids, but was not in that version's fingerprint

    rewrite(copy, leave_out)
    older, bundle = load_bundle(copy, CPU), load_bundle(encoder, CPU)
    assert older.config == bundle.config
    assert older.spec.fingerprint != bundle.spec.fingerprint
    assert older.spec.model_copy(update={"fingerprint": bundle.spec.fingerprint}) == bundle.spec


def test_refusal_of_a_later_bundle_names_both_versions(copy: Path) -> None:
    def add(description: dict[str, Any]) -> None:
        description["config"]["network"]["experts"] = 4
        description["version"] = "7.1"

    assert json.loads((copy / ENCODER_FILE).read_text())["version"] == VERSION
    rewrite(copy, add)
    with pytest.raises(
        DataError, match=r"(?s)network\.experts: unknown key.*by sidestack 7\.1, this is sidestack"
    ) as error:
        load_bundle(copy, CPU)
    assert str(error.value).endswith(VERSION)
