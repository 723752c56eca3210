"""Train rankers of several arms, export them as served models, and make requests to them."""

from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.commit import committing
from sidestack.infra.config import parse
from sidestack.infra.distributed import World
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.ranker.export import export
from sidestack.ranker.export_config import RankerExportConfig
from sidestack.ranker.serving.config import MODEL_FOLDER
from tests.distributed import run_distributed
from tests.encoder.fabricated import LOCAL, materialize_dataset, train_encoder, write_dataset
from tests.ranker.test_resume import train_ranker

ARMS = ("none", "dense", "sid_ngram", "hde", "side")


def train_arms(world: World, dataset: Path, folder: Path) -> None:
    """Train a ranker of every arm."""
    for arm in ARMS:
        train_ranker(world, dataset, folder / arm, arm, epochs=3, batch_size=40)


class TrainedArms:
    """A dataset with SIDs, their encoder, and rankers trained on it, by arm."""

    def __init__(self, folder: Path) -> None:
        write_dataset(folder / "plain")
        train_encoder(LOCAL, folder / "plain", folder / "encoder")
        materialize_dataset(LOCAL, folder / "plain", folder / "encoder", folder / "dataset")
        self.encoder, self.dataset = folder / "encoder", folder / "dataset"
        run_distributed(train_arms, self.dataset, folder, world_size=1)
        self.rankers = {arm: folder / arm for arm in ARMS}


def export_ranker(arms: TrainedArms, arm: str, out: Path, **changes: Any) -> Path:
    """Export the ranker of an arm, and return the version's folder within the saved model."""
    inputs = {"model": arms.rankers[arm], "dataset": arms.dataset}
    if arm not in ("none", "dense"):
        inputs["encoder.sid"] = arms.encoder
    return export_inputs(inputs, out, **changes)


def export_inputs(inputs: dict[str, Path], out: Path, **changes: Any) -> Path:
    """Run the body of stage `ranker_export` on these inputs and commit it; return the version's folder."""
    config = parse(RankerExportConfig, {"checked_rows": 150, **changes}, "ranker_export")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(URI_VARIABLE, raising=False)
        with committing(out, LOCAL, stage="ranker_export") as staging:
            log = RunLog.open(0, "ranker_export", staging, {}, {}, "", None)
            export(StageRun(config, inputs, staging, LOCAL, log))
    return out / MODEL_FOLDER / "artifacts" / "version"


def request_of(**changes: Any) -> dict[str, Any]:
    """Return a request of two candidates, with some of its fields changed."""
    values = {
        "user": {"user_id": 5},
        "time": "2024-01-05T12:00:00Z",
        "history": {
            "item_ids": [1, 2, 3],
            "times": ["2024-01-01T00:00:00Z", "2024-01-02T00:00:00", "2024-01-03T08:30:00+02:00"],
        },
        "candidates": [{"item_id": 8, "price": 0.5, "slot": [1]}, {"item_id": 9, "price": 0.25, "slot": []}],
    }
    return {name: value for name, value in {**values, **changes}.items() if value is not ...}


def planted(version: Path) -> None:
    (version / "network.pkl").write_bytes(b"cos\nsystem\n(S'touch planted'\ntR.")
