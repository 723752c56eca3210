"""The choice of a sweep's best encoder: the metrics that are read, the ranking, and the files that are written."""

from pathlib import Path

import pytest
import torch
import yaml

from sidestack.encoder.bundle import save_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.quantizers import StructuredConfig
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import parse
from sidestack.infra.errors import DataError
from sidestack.infra.record import SUMMARY_FILE
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.report.comparison import SignalLoss
from sidestack.pipelines.studies.sweep.choose import choose, compared
from sidestack.pipelines.studies.sweep.grid import Budget, Setting, quantizer_of, settings
from sidestack.pipelines.studies.sweep.heatmap import draw
from sidestack.pipelines.studies.sweep.result import (
    SettingResult,
    SweepResult,
    as_markdown,
    as_text,
    ranked,
    weighted_loss,
)
from tests.pipelines.fabricated import WORLD, committed

BASE = EncoderConfig.model_validate({"network": {"embedding_width": 8, "categorical_width": 4, "hidden": 8}})
WEIGHTS = {"text": 1.0, "brand": 0.1}
OWN = Setting(levels=3, depth=5, groups=3)


def encoder(path: Path, setting: Setting, losses: dict[str, float], weights: dict[str, float] | None = None) -> Path:
    """Commit an untrained encoder with the given losses."""
    config = BASE.model_copy(update={"quantizer": quantizer_of(StructuredConfig(), setting)})
    signals = SignalSpec(embeddings={"text": 4}, categoricals={"brand": 3}, weights=weights or WEIGHTS)
    torch.manual_seed(0)

    def write(staging: Path) -> None:
        save_bundle(staging, VQFusion(config, signals), config)
        measured = {"text": {"loss": losses["text"]}, "brand": {"loss": losses["brand"], "top1": 0.5}}
        digits = {
            "histogram": [[1] * setting.levels] * setting.digits, "entropy_bits": [1.5] * setting.digits,
            "most_bits": 1.6, "dead_share": [0.0] * setting.digits,
        }  # fmt: skip
        holdout = {"items": 10, "unique_share": 0.9, "signals": measured, "digits": digits}
        with_seconds = RunLog(staging)
        with_seconds.summary({"seconds": 12.0, "holdout": holdout})

    return committed(path, "encoder", write)


def result(setting: Setting, loss: float) -> SettingResult:
    signals = (SignalLoss(name="text", kind="cosine", loss=loss, top1=None),)
    return SettingResult(
        setting=setting, bits=setting.bits(), loss=loss, signals=signals, unique_share=0.5, entropy_bits=20, seconds=61
    )


def test_loss_is_weighted_as_in_training() -> None:
    measured = [SignalLoss(name=name, kind="", loss=loss, top1=None) for name, loss in (("text", 0.3), ("brand", 2.0))]
    assert weighted_loss(measured, WEIGHTS) == pytest.approx(0.5)


def test_ranking_is_by_loss_and_then_by_fewer_digits() -> None:
    long, short = Setting(levels=2, depth=4, groups=6), Setting(levels=64, depth=4, groups=1)
    worse = Setting(levels=4, depth=4, groups=3)
    order = ranked([result(worse, 0.4), result(long, 0.3), result(short, 0.3)])
    assert [one.setting for one in order] == [short, long, worse]


def test_choice_reads_what_the_encoders_measured(tmp_path: Path) -> None:
    other = Setting(levels=8, depth=4, groups=2)
    inputs = {
        "encoder.a": encoder(tmp_path / "a", OWN, {"text": 0.30, "brand": 1.0}),
        "encoder.b": encoder(tmp_path / "b", other, {"text": 0.25, "brand": 1.2}),
    }
    found = compared(inputs, OWN)
    assert found.chosen.setting == other and found.own == OWN and found.weights == WEIGHTS
    assert [one.loss for one in found.results] == pytest.approx([0.37, 0.40])
    assert found.chosen.bits == 24.0 and found.chosen.entropy_bits == 12.0 and found.chosen.seconds == 12.0


def test_encoders_with_different_weights_are_refused(tmp_path: Path) -> None:
    inputs = {
        "encoder.a": encoder(tmp_path / "a", OWN, {"text": 0.3, "brand": 1.0}),
        "encoder.b": encoder(tmp_path / "b", OWN, {"text": 0.3, "brand": 1.0}, {"text": 1.0, "brand": 0.2}),
    }
    with pytest.raises(DataError, match=r"b: signals and weights are .*0\.2"):
        compared(inputs, OWN)


def test_stage_writes_result_heatmap_and_an_overlay_for_a_run(tmp_path: Path) -> None:
    chosen = Setting(levels=8, depth=4, groups=2)
    inputs = {
        "encoder.a": encoder(tmp_path / "a", OWN, {"text": 0.30, "brand": 1.0}),
        "encoder.b": encoder(tmp_path / "b", chosen, {"text": 0.25, "brand": 1.2}),
    }
    out = tmp_path / "out"
    out.mkdir()
    choose(StageRun(EncoderConfig(), inputs, out, WORLD, RunLog(out)))
    assert SweepResult.model_validate_json((out / "sweep.json").read_bytes()).chosen.setting == chosen
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert (out / SUMMARY_FILE).is_file()
    laid_over = yaml.safe_load((out / "chosen.yaml").read_text())
    quantizer = parse(EncoderConfig, laid_over["encoder"], "chosen").quantizer
    assert quantizer == quantizer_of(StructuredConfig(), chosen)
    assert laid_over["materialize"] == {"prefix_lengths": {"sid": [3, 5, 8]}}


def whole_sweep() -> SweepResult:
    tried = list(settings(Budget(bits=24)))
    results = [result(setting, 0.2 + 0.01 * place) for place, setting in enumerate(tried)]
    return SweepResult(weights={"text": 1.0}, own=OWN, results=ranked(results))


def test_table_has_a_line_for_each_setting_and_marks_chosen_and_own() -> None:
    sweep = whole_sweep()
    lines = as_text(sweep).splitlines()
    assert len(lines) == 2 + len(sweep.results) and max(map(len, lines)) <= 100
    assert lines[2].endswith("chosen") and "0.2000" in lines[2]
    (own,) = [line for line in lines if line.endswith("config's own")]
    assert own.split()[:4] == ["3", "5", "3", "15"]
    assert as_markdown(sweep).count("\n") == 2 + len(sweep.results)


def test_heatmap_is_drawn_for_any_number_of_settings(tmp_path: Path) -> None:
    sweep = whole_sweep()
    for number in (1, 5, len(sweep.results)):
        part = sweep.model_copy(update={"results": sweep.results[:number]})
        draw(part, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
