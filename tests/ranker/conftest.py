"""Session fixtures: a small dataset, rankers trained on another one with an encoder, and their exported versions."""

from pathlib import Path

import pytest

from tests.ranker.dataset import write_dataset
from tests.ranker.exporting import ARMS, TrainedArms, export_ranker


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("ranker") / "dataset", rows_a_day=128)


@pytest.fixture(scope="session")
def arms(tmp_path_factory: pytest.TempPathFactory) -> TrainedArms:
    return TrainedArms(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def versions(arms: TrainedArms, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {arm: export_ranker(arms, arm, folder / arm) for arm in ARMS}
