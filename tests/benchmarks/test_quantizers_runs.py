"""The quantizer benchmark's runs: their keys, kept results, failures, and measurement of encoder bundles."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sidestack.benchmarks.quantizers import work
from sidestack.benchmarks.quantizers.__main__ import main
from sidestack.benchmarks.quantizers.corpora import Corpus, Sizes, Source, make_corpus
from sidestack.benchmarks.quantizers.methods import BITS, METHODS, EncoderMethod
from sidestack.benchmarks.quantizers.trained import EncoderCoder
from sidestack.benchmarks.quantizers.work import Task, outcomes, write_result
from sidestack.encoder.bundle import save_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import load_section
from sidestack.infra.errors import ConfigError

CONFIG = Path(work.__file__).parent / "vectors.yaml"
SIGNALS = SignalSpec(embeddings={"vector": 8}, categoricals={}, weights={"vector": 1.0})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    vectors = np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32)
    return make_corpus(Source("some", "", vectors), tmp_path_factory.mktemp("corpora"), Sizes(test=250, queries=40))


@pytest.fixture
def task(corpus: Corpus) -> Task:
    return Task(corpus, "dpca", 24, 0, CONFIG)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, EncoderMethod)])
def test_encoder_methods_have_valid_configurations_of_nearly_the_given_bits(
    name: str, bits: int, corpus: Corpus
) -> None:
    overrides = Task(corpus, name, bits, 0, CONFIG).overrides()
    quantizer = load_section(EncoderConfig, CONFIG, "encoder", overrides).quantizer.build()
    spec = quantizer.sid_spec("")
    assert bits - 0.6 < spec.digits * np.log2(spec.radix) <= bits + 1e-9
    method = METHODS[name]
    assert isinstance(method, EncoderMethod)
    assert method.side == (spec.lines == 1 and spec.levels > 1)


def test_key_depends_on_everything_that_changes_a_result(task: Task, tmp_path: Path) -> None:
    others = [
        replace(task, method="fsq_clamp"),
        replace(task, bits=32),
        replace(task, seed=1),
        replace(task, sets=("encoder.training.epochs=3",)),
        replace(task, method="faiss_pq"),
        replace(task, method="dpca+search"),
        replace(task, method="faiss_pq", seed=1),
    ]
    assert len({task.key(), *(other.key() for other in others)}) == 8
    assert task.key() == replace(task).key()
    elsewhere = tmp_path / "copy.yaml"
    elsewhere.write_text("# a comment\n" + CONFIG.read_text())
    assert replace(task, config=elsewhere).key() == task.key()


def test_key_covers_the_training_code_and_not_the_serving_code() -> None:
    files = work._imported("sidestack.encoder.train")
    assert {"encoder/train.py", "encoder/fusion.py", "encoder/quantizers/structured.py"} <= files
    assert "encoder/materialize.py" not in files


def test_invalid_setting_is_refused_before_any_run(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="epochs"):
        list(outcomes([replace(task, sets=("encoder.training.epochs=no",))], tmp_path, jobs=1, fresh=False))


def test_kept_result_is_not_computed_again(task: Task, tmp_path: Path) -> None:
    write_result(task.result_file(tmp_path), {"cosine_loss": 0.25})
    [outcome] = outcomes([task], tmp_path, jobs=1, fresh=False)
    assert outcome.result == {"cosine_loss": 0.25}
    assert outcome.wall_seconds is None


def test_fresh_run_replaces_the_kept_result(task: Task, tmp_path: Path) -> None:
    faiss_task = replace(task, method="faiss_pq")
    write_result(faiss_task.result_file(tmp_path), {"cosine_loss": -1.0})
    [rerun] = outcomes([faiss_task], tmp_path, jobs=1, fresh=True)
    [kept] = outcomes([faiss_task], tmp_path, jobs=1, fresh=False)
    assert rerun.wall_seconds is not None
    assert rerun.result is not None
    assert 0 < rerun.result["cosine_loss"] < 0.3
    assert kept.result == rerun.result
    assert not list(tmp_path.rglob("*.tmp"))


def test_result_of_edited_code_is_not_kept(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_is_edited", lambda: True)
    [outcome] = outcomes([replace(task, method="faiss_pq")], tmp_path, jobs=1, fresh=False)
    assert outcome.result is None
    assert "edited" in outcome.error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(task: Task, tmp_path: Path) -> None:
    broken = replace(task, sets=("encoder.training.lanes=3", "encoder.training.batch_size=64"))
    found = {
        o.task.method: o for o in outcomes([broken, replace(task, method="faiss_pq")], tmp_path, jobs=1, fresh=False)
    }
    assert found["dpca"].result is None
    assert "encoder.train failed" in found["dpca"].error
    assert "lanes" in found["dpca"].error
    assert found["faiss_pq"].result is not None


def make_coder(folder: Path, quantizer: dict[str, Any], *, side: bool) -> tuple[EncoderCoder, VQFusion]:
    torch.manual_seed(0)
    config = EncoderConfig.model_validate({"quantizer": quantizer, "network": {"hidden": 32, "embedding_width": 16}})
    model = VQFusion(config, SIGNALS)
    model.quantizer.start(torch.randn(600, model.quantizer.latent_dim), torch.Generator().manual_seed(0))
    save_bundle(folder, model, config)
    return EncoderCoder(folder, side=side), model


def test_encoder_bundle_is_measured_with_its_digits_and_prefixes(tmp_path: Path) -> None:
    quantizer = {"kind": "structured", "groups": 2, "depth": 3, "group_dim": 4}
    coder, model = make_coder(tmp_path, quantizer, side=True)
    x = np.random.default_rng(1).standard_normal((1500, 8)).astype(np.float32)  # more than one block
    digits = coder.encode(x)
    assert digits.shape == (1500, 6)
    assert coder.prefixes == (2, 4)
    assert coder.centre == 1.0
    assert len(coder.steps) == 6
    with torch.no_grad():
        table = model.quantizer.codewords()
        h_hat = sum(table[n, torch.from_numpy(digits)[:, n]] for n in range(4))
        expected = model.decoder(h_hat).embeddings[0].numpy()
    assert coder.decode(digits, 4) == pytest.approx(expected, abs=1e-5)
    assert coder.decode(digits, 6) == pytest.approx(coder.decode(digits), abs=1e-5)


def test_codebook_of_free_vectors_has_no_side_digits(tmp_path: Path) -> None:
    coder, _ = make_coder(tmp_path, {"kind": "rqvae", "codes": 16, "depth": 2, "group_dim": 4}, side=False)
    assert coder.radix == 16
    assert coder.centre is None
    assert coder.prefixes == (1,)


@pytest.mark.long
def test_whole_benchmark_runs_on_a_small_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32))
    command = ["--quick", "--vectors", str(tmp_path / "mine.npy"), "--cache", str(tmp_path / "cache")]
    command += ["--out", str(tmp_path / "out"), "--methods", "dpca", "rqvae_ema", "faiss_lsq", "--jobs", "2"]
    main(command)
    rows = {row["method"]: row for row in json.loads((tmp_path / "out/quantizers.json").read_text())["rows"]}
    assert set(rows) == {"dpca", "rqvae_ema", "faiss_lsq", "gaussian_rd"}
    for name in ("dpca", "rqvae_ema", "faiss_lsq"):
        assert 0 < rows[name]["cosine_loss"] < 1
        assert rows[name]["recall"]["20"] > 20 / 300  # more than chance
        assert rows[name]["seconds"] > 0
    text = (tmp_path / "out/quantizers.md").read_text()
    assert "| mine | 24 | dpca |" in text
    for picture in ("loss", "recall", "prefix"):
        assert f"quantizers-mine-{picture}.png" in text
        assert (tmp_path / f"out/quantizers-mine-{picture}.png").stat().st_size > 5000
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().err.count("(kept)") == 3
    main([*command, "--kept", "--seeds", "0", "1"])
    assert capsys.readouterr().err.count("(kept)") == 3
    with pytest.raises(SystemExit):
        main([*command, "--kept", "--seeds", "1"])
    assert "keeps no result" in capsys.readouterr().err
