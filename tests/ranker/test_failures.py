"""A fault of one rank, at any point, ends all ranks soon, and the error of that rank is the reported one."""

import json
import re
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sidestack.infra.commit import committing
from sidestack.infra.preemption import read_mark
from tests.ranker.dataset import write_dataset
from tests.ranker.failing_training import FAULTS, launch
from tests.ranker.training import ARMS, ONE, SMALL

ENDS_S = 30
WORDS = {
    "memory": "MemoryError: planted: memory",
    "full disk": "CommitError: .*no space left on the disk",
    "killed": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    with committing(folder / "dataset", ONE, stage="prepare") as staging:
        write_dataset(staging)
    training = {**SMALL["training"], "checkpoint_every": 8}
    section = {**SMALL, "arms": ARMS, "arm": "sid_ngram", "training": training}
    (folder / "run.yaml").write_text(yaml.safe_dump({"ranker": section}))
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_one_rank_ends_all_ranks_and_is_reported(folder: Path, tmp_path: Path, fault: str) -> None:
    # Only rank 0 plans; every other fault is on rank 1, whose error must reach rank 0.
    rank = 0 if fault == "plan" else 1
    happened, logs = tmp_path / "happened", tmp_path / "logs"
    arguments = ["--config", str(folder / "run.yaml"), "--input", f"dataset={folder / 'dataset'}"]
    with pytest.raises(ChildFailedError):
        launch(fault, rank, happened, [*arguments, "--out", str(tmp_path / "out")], logs)
    took = time.time() - float(happened.read_text())
    print(f"{fault}: {took:.1f} s")
    assert took < ENDS_S
    assert not (tmp_path / "out").exists()
    assert read_mark(tmp_path / "out") is None
    reports = {
        file.parent.name: json.loads(file.read_text())["message"] for file in tmp_path.glob("logs/*/*/*/error.json")
    }
    if words := WORDS.get(fault, f"planted: {fault}"):
        assert re.search(words, reports[str(rank)]["message"]), reports
        others = [report["message"] for of, report in reports.items() if of != str(rank)]
        # The other ranks repeat the error or have lost their connection.
        assert all(re.search(rf"{words}|[Cc]onnection|rank {rank} failed|No such file", one) for one in others), reports
