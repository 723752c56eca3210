"""Encoder training resumes from its last checkpoint after torchrun restarts a killed rank."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sidestack.encoder.bundle import WEIGHTS_FILE
from sidestack.infra.commit import committing
from tests.encoder.fabricated import ENCODER, LOCAL, merged, write_dataset
from tests.encoder.test_resume import rows
from tests.infra.jobs import LIMIT_S, job
from tests.infra.test_elastic import RESTARTING

pytestmark = pytest.mark.chaos
EVERY = 4


def train(folder: Path, out: Path, dying: str) -> None:
    log = folder / "job.log"
    arguments = ["--config", str(folder / "run.yaml"), "--input", f"dataset={folder / 'dataset'}", "--out", str(out)]
    environment = {**RESTARTING, "DYING": dying}
    with job(
        "tests.encoder.dying_training", arguments, log, environment=environment, torchrun=["--max-restarts", "1"]
    ) as process:
        assert process.wait(LIMIT_S) == 0, log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    with committing(folder / "dataset", LOCAL, stage="prepare") as staging:
        write_dataset(staging)
    training = {"log_every": 1, "checkpoint_every": EVERY}
    (folder / "run.yaml").write_text(yaml.safe_dump({"encoder": merged(ENCODER, {"training": training})}))
    train(folder, folder / "whole", dying="-1:0")
    return folder


@pytest.mark.parametrize("step", range(20))
def test_restarted_training_ends_with_the_weights_of_an_uninterrupted_one(
    folder: Path, step: int, record_property: Callable[[str, object], None]
) -> None:
    record_property("fault", "a rank of an encoder's training killed, and restarted by torchrun")
    out, whole = folder / f"killed-{step}", folder / "whole"
    train(folder, out, dying=f"{step % 2}:{step}")
    resumed = json.loads((out / "summary.json").read_text())["resumed_from_step"]
    # A checkpoint is written in the background and becomes valid EVERY / 4 steps later; an earlier kill loses it.
    assert (resumed or 0) in {(step - 1) // EVERY * EVERY, step // EVERY * EVERY} - {-EVERY}
    record_property("steps_lost", step - (resumed or 0))
    assert (out / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert rows(out) == rows(whole)
    shutil.rmtree(out)
