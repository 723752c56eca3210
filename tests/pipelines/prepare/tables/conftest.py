"""A valid folder of a user's own tables, its snapshot, and a copy that tests change."""

import shutil
from pathlib import Path

import pytest

from sidestack.infra.distributed import ALONE
from tests.pipelines.prepare.growing import tables_config, write_folder
from tests.pipelines.prepare.running import run_prepare


@pytest.fixture(scope="package")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a valid folder, for tests that do not change it."""
    return write_folder(tmp_path_factory.mktemp("good") / "own", days=4)


@pytest.fixture(scope="package")
def prepared(good: Path) -> Path:
    """Prepare the snapshot of the valid folder."""
    run_prepare(ALONE, tables_config(good), good.parent / "out")
    return good.parent / "out"


@pytest.fixture
def own(good: Path, tmp_path: Path) -> Path:
    """Return a copy of the valid folder, for tests that change it."""
    return Path(shutil.copytree(good, tmp_path / "own"))
