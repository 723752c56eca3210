"""Sheets of nearest neighbours by embedding and by code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image

from sidestack.benchmarks.neighbours import Catalogue, codes, draw_sheets, main, make_sheets, page, read_catalogue
from sidestack.encoder.bundle import load_bundle
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import LOCAL, SPEC, item_table, train_encoder, write_dataset

SHORT = {"training": {"epochs": 1, "batch_size": 64, "log_every": 5}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder") / "out"
    train_encoder(LOCAL, dataset, out, SHORT)
    return out


def catalogue() -> Catalogue:
    """Return five items on a circle, whose codes swap the second and the last."""
    angles = np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    on_circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    texts = ["query", "near", "next | odd", "far", "last"]
    return Catalogue(np.arange(5), texts, on_circle, on_circle[[0, 4, 2, 3, 1]], unpacked=True)


def test_sheet_has_both_kinds_of_neighbours_and_their_overlap() -> None:
    [sheet] = [sheet for sheet in make_sheets(catalogue(), 5, 2, seed=0) if sheet.query == 0]
    assert sheet.true.tolist() == [1, 2]
    assert sheet.found.tolist() == [4, 2]
    assert sheet.hits == 1


def test_page_marks_common_neighbours_and_escapes_texts() -> None:
    sheets = [sheet for sheet in make_sheets(catalogue(), 5, 2, seed=0) if sheet.query == 0]
    text = page(sheets, catalogue(), None)
    assert "| 1 | near | 0.995 | last | 0.540 |" in text
    assert r"| 2 | **next \| odd** | 0.955 | **next \| odd** | 0.955 |" in text
    assert "Bold: named by both, 1 of 2." in text


@pytest.mark.parametrize(("queries", "neighbours"), [(6, 2), (0, 2), (2, 5), (2, 0)])
def test_more_queries_or_neighbours_than_items_are_refused(queries: int, neighbours: int) -> None:
    with pytest.raises(ConfigError, match="5 items"):
        make_sheets(catalogue(), queries, neighbours, seed=0)


def test_items_are_read_encoded_and_unpacked(dataset: Path, encoder: Path) -> None:
    bundle = load_bundle(encoder, torch.device("cpu"))
    found = read_catalogue(dataset, bundle, None)
    present = item_table()["text_embedding"].is_valid().to_numpy()
    assert found.ids.tolist() == np.flatnonzero(present).tolist()
    assert found.texts[0] == f"item {found.ids[0]}"
    assert np.linalg.norm(found.true_ND, axis=1) == pytest.approx(np.ones(len(found.ids)), abs=1e-5)
    code, unpacked = codes(item_table(), bundle)
    assert unpacked
    levels = code / np.array(bundle.spec.steps, np.float32)
    assert np.abs(levels - levels.round()).max() < 1e-4
    assert set(levels.round().astype(int).flatten()) <= {-1, 0, 1}


def test_other_signal_must_be_an_embedding_of_the_encoder(dataset: Path, encoder: Path) -> None:
    bundle = load_bundle(encoder, torch.device("cpu"))
    assert read_catalogue(dataset, bundle, "behaviour_embedding").true_ND.shape[1] == 8
    with pytest.raises(ConfigError, match="'brand'.*text_embedding, behaviour_embedding"):
        read_catalogue(dataset, bundle, "brand")


def test_dataset_with_other_signals_is_refused(encoder: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "other")
    values = {**json.loads(read_dataset(dataset).spec.model_dump_json()), "categoricals": {"brand": 12}}
    (dataset / "dataset.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="'type'"):
        read_catalogue(dataset, load_bundle(encoder, torch.device("cpu")), None)


def test_command_writes_sheets_and_pictures(
    dataset: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for item in range(0, SPEC.num_items, 2):  # the other half has no pictures and is shown as text
        image.imsave(pictures / f"{item}.png", np.full((4, 4, 3), item / SPEC.num_items))
    command = ["--encoder", str(encoder), "--dataset", str(dataset), "--out", str(tmp_path / "out")]
    main([*command, "--queries", "3", "--neighbours", "4", "--images", str(pictures)])
    assert "3 queries among" in capsys.readouterr().out
    text = (tmp_path / "out/neighbours.md").read_text()
    assert text.count("## item ") == 3
    assert "![neighbours](neighbours.png)" in text
    assert image.imread(tmp_path / "out/neighbours.png").shape[1] > 900


def test_invalid_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "3.png").write_text("no picture")
    sheets = make_sheets(catalogue(), 5, 2, seed=0)
    with pytest.raises(DataError, match=r"3\.png"):
        draw_sheets(sheets, catalogue(), {"3": tmp_path / "3.png"}, tmp_path / "out.png")


def test_user_error_is_printed(
    dataset: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--dataset", str(dataset), "--out", str(tmp_path / "out"), "--queries", "600", "--neighbours", "1"]
    for wrong in (["--encoder", str(tmp_path)], ["--encoder", str(encoder), "--images", str(tmp_path / "none")]):
        with pytest.raises(SystemExit):
            main([*command, *wrong])
        assert "neighbours: error: " in capsys.readouterr().err
