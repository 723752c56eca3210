"""Stage `sweep`: compare the encoders of all settings and choose one.

Inputs are the encoders (`--input encoder.<setting>=DIR`). The output is `sweep.json`, the same as tables (text,
Markdown) and a heat map (PNG), and `chosen.yaml`, an overlay for a run file.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import plain, to_yaml
from sidestack.infra.errors import DataError
from sidestack.infra.record import SUMMARY_FILE
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tables import read_json
from sidestack.pipelines.report.encoder import read_encoder
from sidestack.pipelines.studies.sweep.grid import Setting, knobs_of, prefix_lengths, quantizer_of, setting_of
from sidestack.pipelines.studies.sweep.heatmap import draw
from sidestack.pipelines.studies.sweep.result import (
    INPUT,
    SettingResult,
    SweepResult,
    as_markdown,
    as_text,
    ranked,
    weighted_loss,
)

RESULT_FILE, CHOSEN_FILE, TABLE_FILE, PICTURE_FILE = "sweep.json", "chosen.yaml", "table.txt", "heatmap.png"


def choose(run: StageRun[EncoderConfig]) -> None:
    """Read every encoder's measures, choose the setting with the lowest loss, and write the outputs; only rank 0 works.

    Raises:
        DataError: an input is not an encoder's output, or encoders were not trained on the same signals.
    """
    if not run.world.is_main:
        return
    sweep = compared(run.inputs, setting_of(knobs_of(run.config)))
    files = {
        RESULT_FILE: sweep.model_dump_json(indent=2) + "\n",
        TABLE_FILE: as_text(sweep),
        "table.md": as_markdown(sweep),
        CHOSEN_FILE: overlay(run.config, sweep.chosen.setting),
    }
    for name, text in files.items():
        (run.out / name).write_text(text, encoding="utf-8")
    draw(sweep, run.out / PICTURE_FILE)
    run.log.summary({
        "chosen": plain(sweep.chosen.setting),
        "loss": {result.setting.name: result.loss for result in sweep.results},
    })  # fmt: skip


def compared(encoders: Mapping[str, Path], own: Setting) -> SweepResult:
    """Rank the encoders of a sweep.

    Args:
        encoders: their committed outputs by name.
        own: the configuration's own setting.

    Raises:
        DataError: see `choose`.
    """
    measured = [(path, *_measured(path)) for path in encoders.values()]
    first, weights, _ = measured[0]
    for path, others, _ in measured:
        if others != weights:
            raise DataError(f"{path}: signals and weights are {others}, those of {first} are {weights}")
    return SweepResult(weights=weights, own=own, results=ranked([result for *_, result in measured]))


def _measured(path: Path) -> tuple[dict[str, float], SettingResult]:
    """Return the weights of an encoder's signals and its measures."""
    bundle, summary = load_bundle(path, torch.device("cpu")), read_encoder(path)
    knobs = knobs_of(bundle.config)
    setting, weights = setting_of(knobs), bundle.signals.weights
    return weights, SettingResult(
        setting=setting,
        bits=setting.bits(knobs.lines),
        loss=weighted_loss(summary.losses, weights),
        signals=summary.losses,
        unique_share=summary.unique_share,
        entropy_bits=sum(summary.entropy_bits),
        seconds=read_json(path / SUMMARY_FILE)["seconds"],
    )


def overlay(config: EncoderConfig, chosen: Setting) -> str:
    """Return the chosen setting as YAML, an overlay for a run file."""
    quantizer, lengths = plain(quantizer_of(config.quantizer, chosen)), prefix_lengths(chosen)
    return to_yaml({"encoder": {"quantizer": quantizer}, "materialize": {"prefix_lengths": {DEFAULT_NAME: lengths}}})


if __name__ == "__main__":
    run_stage("sweep", "encoder", EncoderConfig, (f"{INPUT}*",), choose)
