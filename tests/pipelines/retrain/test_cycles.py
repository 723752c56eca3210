"""Nights of retraining, end to end: what is trained, judged, promoted, registered, and taken back."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.mlflow_runs import URI_VARIABLE, connect
from pipelines.config import PipelineConfig
from pipelines.retrain.ledger import Cycle
from tests.pipelines.retrain.nights import config_in, night, pass_nights, retraining

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PipelineConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URI_VARIABLE, raising=False)
        yield config_in(tmp_path_factory.mktemp("nights"))
        os.environ.pop(URI_VARIABLE, None)


@pytest.fixture(scope="module")
def cycles(config: PipelineConfig) -> list[Cycle]:
    return pass_nights(config, range(3))


def test_nights_go_on_from_the_champion(cycles: list[Cycle], config: PipelineConfig) -> None:
    for cycle in cycles:
        print([(g.name, g.verdict, g.figure, g.why) for g in cycle.outcome.gates], cycle.outcome.seconds)
    assert [cycle.outcome.promoted for cycle in cycles] == [True, True, True]
