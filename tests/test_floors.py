"""Modules import only from their own floor or below (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "infra": {"infra"},
    "encoder": {"infra", "encoder"},
    # Only the definition of SIDs; and, as a served ranker encodes new items, the encoder's bundle and serving code.
    "ranker": {
        "infra",
        "ranker",
        "encoder.sid",
        "encoder.sid_codebook",
        "encoder.sid_map",
        "encoder.signals",
        "encoder.bundle",
        "encoder.encoding",
        "encoder.serving",
    },
    # Modules that do not import torch.
    "components": {"components", "infra.clusters.config", "infra.remote.urls", "infra.rendezvous"},
    "pipelines": {"infra", "encoder", "ranker", "components", "pipelines"},
    "benchmarks": {"infra", "encoder", "ranker", "components", "pipelines", "benchmarks"},
}
MODULES = sorted(file for floor in MAY_IMPORT for file in (ROOT / floor).rglob("*.py"))


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("sidestack.") for name in found if name.startswith("sidestack.")}


def test_pipeline_imports_of_studies_only_their_sections() -> None:
    """Papers' tables, sweep and tuning start runs. Only the run's file, which has their settings, imports from them."""
    studies = ROOT / "pipelines/studies"
    for file in (ROOT / "pipelines").rglob("*.py"):
        if not file.is_relative_to(studies):
            uses = {name for name in imported(file) if name.startswith("pipelines.studies")}
            allowed = {name for name in uses if ".config" in name and file == ROOT / "pipelines/config.py"}
            assert uses == allowed, f"{file.relative_to(ROOT)} imports {sorted(uses - allowed)}"


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_module_imports_only_from_its_own_floor_or_below(file: Path) -> None:
    floor = file.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[floor]
    for name in imported(file):
        fits = any(name == rule or name.startswith(f"{rule}.") or rule == f"{name}.sid" for rule in allowed)
        assert fits, (
            f"{file.relative_to(ROOT)} imports {name}; {floor}/ may import only {sorted(allowed)} of this project"
        )
