"""The precision of the network's products: bfloat16 trains close to float32, and states and outputs stay float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sidestack.infra.distributed import World
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.tracking import RunLog
from sidestack.ranker.config import TrainingConfig
from sidestack.ranker.constants import read_constants
from sidestack.ranker.model import StepOutput
from sidestack.ranker.newest import NewestEntries
from sidestack.ranker.preparation import open_splits
from sidestack.ranker.sharding import build_sharded
from sidestack.ranker.step_runner import StepRunner
from sidestack.ranker.train import use_tf32
from tests.ranker.dataset import write_dataset
from tests.ranker.training import config_of, run_steps

HISTORY = {"history": {"heads": 2, "encoder_layers": 1}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{arm: (arm, {}) for arm in ("none", "dense", "sid_ngram", "hde", "side", "side_lines")},
    "history": ("side", HISTORY),
}
"""Arms that cover every kind of layer, and the options of the history."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("precision") / "dataset", rows_a_day=128)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_trains_close_to_float32(world: World, dataset: Path, name: str) -> None:
    arm, model = MODELS[name]
    whole, half = (
        run_steps(world, dataset, config_of(arm, model=model, training={"precision": precision}), 6)
        for precision in ("float32", "bfloat16")
    )
    losses_ST, expected_ST = torch.tensor(half.losses), torch.tensor(whole.losses)
    assert losses_ST.isfinite().all()
    assert not losses_ST.equal(expected_ST)
    torch.testing.assert_close(losses_ST, expected_ST, rtol=1e-2, atol=0)
    assert {value.dtype for value in (*half.weights.values(), *half.states.values())} == {torch.float32}


def predictions(world: World, dataset: Path, precision: str) -> Iterator[StepOutput]:
    config = config_of("side", training={"precision": precision})
    fitting, held_out = open_splits(read_dataset(dataset), config)
    sharded = build_sharded(
        fitting.features, config, world, read_constants(read_dataset(dataset), fitting.features.constants)
    )
    sharded.model.eval()
    reader = held_out.open(config.training, world, is_training=False)
    for _, output in StepRunner(sharded, fitting.features, world, NewestEntries()).run(reader, 0):
        yield output


def test_predictions_and_totals_have_full_precision(world: World, dataset: Path) -> None:
    pairs = zip(predictions(world, dataset, "bfloat16"), predictions(world, dataset, "float32"), strict=True)
    for half, whole in pairs:
        assert half.probabilities_BT.dtype == torch.float32
        # Logits rounded to bfloat16 would keep only 8 bits.
        torch.testing.assert_close(half.probabilities_BT, whole.probabilities_BT, rtol=0, atol=5e-3)
        assert half.totals_3T.dtype == torch.float64


def test_float32_is_the_default() -> None:
    assert TrainingConfig().precision == "float32"


def test_tf32_warns_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path)
    try:
        use_tf32(torch.device("cpu"), log)
        assert torch.get_float32_matmul_precision() == "highest"
        message = "warning: ranker.training.precision=tf32 changes nothing on a CPU: float32 is used\n"
        assert capsys.readouterr().err.endswith(message)
        use_tf32(torch.device("cuda"), log)
        assert torch.get_float32_matmul_precision() == "high"
        assert capsys.readouterr().err == ""
    finally:
        torch.set_float32_matmul_precision("highest")
