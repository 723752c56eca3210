"""Fabricated inputs of the comparison stage, and its outputs, shared by all tests of the folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.compare.running import run_compare
from tests.pipelines.fabricated import all_inputs


@pytest.fixture(scope="package")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Commit the inputs of a comparison with one training of each arm."""
    return all_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="package")
def out(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of the comparison of `inputs`, with figures."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    run_compare(inputs, folder, draw=True)
    return folder


@pytest.fixture(scope="package")
def comparison(out: Path) -> dict[str, Any]:
    """Return `comparison.json` of `out`."""
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


@pytest.fixture(scope="package")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Commit the inputs of a comparison with three trainings of each arm."""
    return all_inputs(tmp_path_factory.mktemp("replicated"), replicates=3)


@pytest.fixture(scope="package")
def thrice(replicated: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of the comparison of `replicated`, with figures."""
    folder = tmp_path_factory.mktemp("thrice") / "out"
    run_compare(replicated, folder, draw=True)
    return folder
