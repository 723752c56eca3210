"""A ranker's job that gets a signal: after SIGTERM it resumes at the saved step; a rank stopped by SIGSTOP is named."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from sidestack.infra.commit import committing
from sidestack.infra.preemption import read_mark
from tests.infra.jobs import LIMIT_S, job, ranks_of, wait_for
from tests.ranker.dataset import write_dataset
from tests.ranker.test_resume import history, predictions, summary, weights
from tests.ranker.training import ARMS, ONE, SMALL

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preempted")
    with committing(folder / "dataset", ONE, stage="prepare") as staging:
        write_dataset(staging)
    return folder


def arguments(folder: Path, out: Path, arm: str, epochs: int) -> list[str]:
    section = {**SMALL, "arms": ARMS, "arm": arm, "training": {**SMALL["training"], "epochs": epochs}}
    config = out.with_name(f"{out.name}.yaml")
    config.write_text(yaml.safe_dump({"ranker": section}))
    return ["--config", str(config), "--input", f"dataset={folder / 'dataset'}", "--out", str(out)]


def is_training(out: Path) -> bool:
    found = list(out.parent.glob(f".{out.name}.*.tmp/history.jsonl"))
    return any("train_click_ne" in file.read_text() for file in found)


@pytest.mark.parametrize("arm", ["none", "side"])
def test_terminated_job_resumes_bit_for_bit(
    folder: Path, tmp_path: Path, arm: str, record_property: Callable[[str, object], None]
) -> None:
    resumed, whole, log = tmp_path / "resumed", tmp_path / "whole", tmp_path / "job.log"
    with job("sidestack.ranker.train", arguments(folder, resumed, arm, epochs=8), log) as process:
        wait_for(lambda: is_training(resumed), process, log)
        process.terminate()
        assert process.wait(LIMIT_S) == 1
    mark = read_mark(resumed)
    assert mark is not None and mark.step is not None and mark.seconds is not None, log.read_text()
    record_property("fault", "SIGTERM to a ranker's job")
    record_property("measure", "from SIGTERM to the mark")
    record_property("seconds", mark.seconds)
    record_property("steps_lost", 0)
    assert mark.seconds < 20
    for out in (resumed, whole):
        with job("sidestack.ranker.train", arguments(folder, out, arm, epochs=8), log) as process:
            assert process.wait(LIMIT_S) == 0, log.read_text()
    assert summary(resumed)["resumed_from_step"] == mark.step
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert predictions(resumed).equals(predictions(whole))
    assert history(resumed) == history(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_rank_is_named_in_the_log(
    folder: Path, tmp_path: Path, rank: int, record_property: Callable[[str, object], None]
) -> None:
    """Timeouts have their default values."""
    out, log = tmp_path / "out", tmp_path / "job.log"
    with job("sidestack.ranker.train", arguments(folder, out, "none", epochs=1000), log) as process:
        wait_for(lambda: is_training(out), process, log)
        os.kill(ranks_of(process.pid)[rank], signal.SIGSTOP)
        began = time.monotonic()
        words = rf"rank {1 - rank}: warning: .* for \d+ s; rank {rank} has sent no heartbeat for \d+ s, its last from '"
        wait_for(lambda: re.search(words, log.read_text()), process, log)
    record_property("fault", "SIGSTOP to a rank of a ranker's job")
    record_property("measure", "from SIGSTOP to the rank's name")
    record_property("seconds", time.monotonic() - began)
