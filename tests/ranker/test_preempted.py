"""A ranker's job that gets SIGTERM goes on from that step, and ends as one that was never stopped."""

from pathlib import Path

import pytest
import torch
import yaml

from infra.commit import committing
from infra.preemption import read_mark
from tests.infra.jobs import LIMIT_S, job, wait_for
from tests.ranker.dataset import write_dataset
from tests.ranker.test_resume import history, predictions, summary, weights
from tests.ranker.training import ARMS, ONE, SMALL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("arm", ["side"])
def test_a_job_that_was_terminated_goes_on_bit_for_bit(tmp_path: Path, arm: str) -> None:
    with committing(tmp_path / "dataset", ONE, stage="prepare") as staging:
        write_dataset(staging)
    section = {**SMALL, "arms": ARMS, "arm": arm, "training": {**SMALL["training"], "epochs": 20}}
    config, log = tmp_path / "run.yaml", tmp_path / "job.log"
    config.write_text(yaml.safe_dump({"ranker": section}))
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"

    def arguments(out: Path) -> list[str]:
        return ["--config", str(config), "--input", f"dataset={tmp_path / 'dataset'}", "--out", str(out)]

    def is_training() -> bool:
        found = list(resumed.parent.glob(f".{resumed.name}.*.tmp/history.jsonl"))
        return any("train_click_ne" in file.read_text() for file in found)

    with job("ranker.train", arguments(resumed), log) as process:
        wait_for(is_training, process, log)
        process.terminate()
        assert process.wait(LIMIT_S) == 1
    mark = read_mark(resumed)
    assert mark is not None and mark.step is not None and mark.seconds is not None, log.read_text()
    print(f"from SIGTERM to the mark: {mark.seconds:.2f} s, step {mark.step}")
    assert mark.seconds < 20
    for out in (resumed, whole):
        with job("ranker.train", arguments(out), log) as process:
            assert process.wait(LIMIT_S) == 0, log.read_text()
    assert summary(resumed)["resumed_from_step"] == mark.step
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert predictions(resumed).equals(predictions(whole))
    assert history(resumed) == history(whole)
