"""Rebuilding a run's file from its stages' sections, and refusing sections that no single file resolves to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.config import parse, plain, to_yaml
from sidestack.infra.errors import DataError
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.run_file import run_file
from tests.pipelines.fabricated import ranker_section

CONFIG = parse(
    PipelineConfig,
    {
        "prepare": {"source": {"kind": "synthetic", "num_items": 60}},
        "encoder": {"training": {"epochs": 2, "seed": 7}},
        "encoders": {"text_sid": {"signals": {"text_embedding": 1.0}, "training": {"epochs": 3}}},
        "materialize": {"prefix_lengths": {"sid": [5]}},
        "run": {"name": "first"},
    },
    "run.yaml",
)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    sections = {
        "prepare": {"prepare": plain(CONFIG.prepare)},
        "encoder.sid": {"encoder": plain(CONFIG.encoder_of("sid"))},
        "encoder.text_sid": {"encoder": plain(CONFIG.encoder_of("text_sid"))},
        "dataset": {"materialize": plain(CONFIG.materialize)},
    }
    return {name: output(tmp_path / name, values) for name, values in sections.items()}


def output(path: Path, sections: Mapping[str, Any]) -> Path:
    """Write a stage's output that has only the configuration it was made with."""
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(sections))
    return path


def arm(path: Path, name: str, *changes: Mapping[str, Any]) -> list[Path]:
    """Write an arm's replicates, each with its changed settings of the training."""
    found = []
    for replicate, changed in enumerate(changes or ({},)):
        section = ranker_section(name, replicate)
        section["training"] |= changed
        found.append(output(path / f"{name}.{replicate}", {"ranker": section}))
    return found


def test_file_resolves_to_the_sections_it_is_built_from(inputs: dict[str, Path], tmp_path: Path) -> None:
    arms = {"none": arm(tmp_path, "none", {}, {}), "side": arm(tmp_path, "side", {}, {})}
    text = run_file(inputs, arms, CompareConfig(confidence=0.9))
    again = parse(PipelineConfig, yaml.safe_load(text), "pasted")
    assert again.arms == ("none", "side") and again.run.replicates == 2 and again.compare.confidence == 0.9
    assert again.prepare == CONFIG.prepare and again.materialize == CONFIG.materialize
    for name in ("sid", "text_sid"):
        assert again.encoder_of(name, 1) == CONFIG.encoder_of(name, 1)
    for name in arms:
        assert [plain(again.ranker_of(name, r)) for r in range(2)] == [ranker_section(name, r) for r in range(2)]


def test_arm_from_another_stage_keeps_its_section(inputs: dict[str, Path], tmp_path: Path) -> None:
    trees = [output(tmp_path / f"trees.{r}", {"trees": {"depth": 3, "seed": r}}) for r in range(2)]
    text = run_file(inputs, {"none": arm(tmp_path, "none", {}, {}), "trees": trees}, CompareConfig())
    values = yaml.safe_load(text)
    assert values["trees"] == {"depth": 3, "seed": 0} and list(values["ranker"]["arms"]) == ["none"]


def test_sections_that_no_single_file_resolves_to_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    none = arm(tmp_path, "none")
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="side differs from none in more than an arm may set for itself"):
        run_file(inputs, {"none": none, "side": arm(tmp_path, "side", {"batch_size": 64})}, CompareConfig())
    with pytest.raises(DataError, match="replicates of none differ in more than their seeds"):
        run_file(inputs, {"none": arm(tmp_path / "b", "none", {}, {"warmup_steps": 9})}, CompareConfig())
    (inputs["prepare"] / "config.yaml").unlink()
    with pytest.raises(DataError, match="the output prepare does not record how it was made"):
        run_file(inputs, {"none": none}, CompareConfig())
