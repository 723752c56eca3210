"""A training that is stopped in mid-epoch and resumed writes the same bytes as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sidestack.encoder.bundle import WEIGHTS_FILE
from sidestack.encoder.quantizers import OWN
from sidestack.infra.commit import committing
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, PreemptedError
from sidestack.infra.manifest import read_manifest
from sidestack.infra.tracking import RunLog
from tests.distributed import run_distributed
from tests.encoder.fabricated import ENCODER, LOCAL, merged, train_encoder, write_dataset

# 10 steps per epoch; the codebook is set at steps 0, 1, 2, 4 and 6 of 20.
EVERY_STEP = {"training": {"log_every": 1, "checkpoint_every": 4}}
TIMES = {"train/items_per_second", "train/data_wait_share"}


class Stopped(Exception):
    """Raised to stop a training."""


class StoppingLog(RunLog):
    """Stop the training when step 7, in mid-epoch, is recorded: three steps after a checkpoint."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            raise Stopped


class KillingLog(RunLog):
    """Kill the process when step 7 is recorded."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class RequestingLog(RunLog):
    """Request the rank to stop when step 7 is recorded, as a signal does."""

    world: World

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            self.world.state.ask_to_stop("SIGTERM")


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the history without the metrics that measure time."""
    lines = (out / "history.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]


def require_equal(resumed: Path, whole: Path, step: int = 4) -> None:
    assert (resumed / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert rows(resumed) == rows(whole)
    recorded = [row["step"] for row in rows(resumed) if "train/loss" in row]
    assert recorded == list(range(1, 21))
    assert json.loads((resumed / "summary.json").read_text())["resumed_from_step"] == step
    assert not resumed.with_name(f"{resumed.name}.checkpoint").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantizer": {"kind": "structured", "lines": 3, "groups": 2, "depth": 2, "group_dim": 4}},
        {
            "quantizer": {
                "kind": "rqvae",
                "codes": 8,
                "depth": 3,
                "group_dim": 8,
                "update": "ema",
                "prefix_dropout": 0.5,
            }
        },
    ],
    ids=["dpca", "lines", "rqvae"],
)
def test_one_rank_resumes_bit_for_bit(dataset: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = {**EVERY_STEP, **changes}
    changes["training"] = {**changes["training"], "revive_every": 3, "precision": "bfloat16"}
    with pytest.raises(Stopped):
        train_encoder(LOCAL, dataset, tmp_path / "resumed", changes, StoppingLog)
    assert not (tmp_path / "resumed").exists()
    assert [path.name for path in tmp_path.glob("*.checkpoint/*")] == ["step-000000000004"]
    train_encoder(LOCAL, dataset, tmp_path / "resumed", changes)
    train_encoder(LOCAL, dataset, tmp_path / "whole", changes)
    require_equal(tmp_path / "resumed", tmp_path / "whole")


def train_both(world: World, dataset: Path, folder: Path) -> None:
    for name in ("resumed", "whole"):
        train_encoder(world, dataset, folder / name, EVERY_STEP)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_resume_bit_for_bit_after_a_kill(dataset: Path, tmp_path: Path, ranks: int) -> None:
    """Four ranks are tested as well as two: a sum of three or more numbers depends on the order of addition."""
    with pytest.raises(BrokenProcessPool):
        run_distributed(
            train_encoder, dataset, tmp_path / "resumed", EVERY_STEP, KillingLog, world_size=ranks, timeout_s=20
        )
    run_distributed(train_both, dataset, tmp_path, world_size=ranks)
    require_equal(tmp_path / "resumed", tmp_path / "whole")


def stop_and_train_both(world: World, dataset: Path, folder: Path, changes: dict[str, Any]) -> int | None:
    """Train with a request to stop one rank, and without; return the step that was saved."""
    RequestingLog.world = world
    with pytest.raises(PreemptedError, match="preempted at step") as stop:
        train_encoder(world, dataset, folder / "resumed", changes, RequestingLog)
    assert not (folder / "resumed").exists()
    world.state.signal, world.state.asked_at, world.state.must_stop = None, None, False
    for name in ("resumed", "whole"):
        train_encoder(world, dataset, folder / name, changes)
    return stop.value.step


STOPPED = 12
"""The request comes in step 7 and travels with the next batch that is read: ten batches were read for the sample, and
one is read ahead.
"""
KINDS = list(OWN)
SMALL = {
    "structured": {"groups": 2, "depth": 3, "group_dim": 4},
    "rqvae": {"codes": 8, "depth": 3, "group_dim": 8},
    "residual_kmeans": {"codes": 8, "depth": 3, "group_dim": 8},
    "product": {"codes": 8},
    "topk_kmeans": {"clusters": 16, "k": 3, "latent_dim": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stop_request_saves_the_step_at_which_all_ranks_know_it(dataset: Path, tmp_path: Path, kind: str) -> None:
    quantizer = {"kind": kind, **SMALL.get(kind, {})}
    changes = {"training": {"log_every": 1, "revive_every": 3}, "quantizer": quantizer}
    assert stop_and_train_both(LOCAL, dataset, tmp_path, changes) == STOPPED
    require_equal(tmp_path / "resumed", tmp_path / "whole", step=STOPPED)


def test_stop_request_to_one_rank_saves_the_same_step_on_all(dataset: Path, tmp_path: Path) -> None:
    saved = run_distributed(stop_and_train_both, dataset, tmp_path, {"training": {"log_every": 1}}, world_size=2)
    assert saved == [STOPPED, STOPPED]
    require_equal(tmp_path / "resumed", tmp_path / "whole", step=STOPPED)


def stopped(world: World, dataset: Path, out: Path) -> None:
    with pytest.raises(Stopped):
        train_encoder(world, dataset, out, EVERY_STEP, StoppingLog)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_checkpoint_resumes_with_another_number_of_ranks(
    dataset: Path, tmp_path: Path, before: int, after: int
) -> None:
    """Rows are the same, random draws are not: losses stay close to those of an uninterrupted training."""
    run_distributed(stopped, dataset, tmp_path / "moved", world_size=before)
    run_distributed(train_encoder, dataset, tmp_path / "moved", EVERY_STEP, world_size=after)
    assert read_manifest(tmp_path / "moved").facts["resumed_with_other"] == ["ranks"]
    run_distributed(train_encoder, dataset, tmp_path / "whole", EVERY_STEP, world_size=after)
    assert json.loads((tmp_path / "moved/summary.json").read_text())["resumed_from_step"] == 4
    moved, whole = (losses(tmp_path / name) for name in ("moved", "whole"))
    assert [*moved] == [*whole] == [*range(1, 21)]
    for step, loss in moved.items():
        assert loss == pytest.approx(whole[step], rel=0.25), step


def losses(out: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in rows(out) if "train/loss" in row}


def test_checkpoint_resumes_with_other_threads_and_the_saved_random_state(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(LOCAL, dataset, tmp_path / "moved")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train_encoder(LOCAL, dataset, tmp_path / "moved", EVERY_STEP)
    finally:
        torch.set_num_threads(threads)
    assert "checkpoint at step 4 of 20, with other threads: last bits may differ" in capsys.readouterr().err
    train_encoder(LOCAL, dataset, tmp_path / "whole", EVERY_STEP)
    moved, whole = (losses(tmp_path / name) for name in ("moved", "whole"))
    assert moved == pytest.approx(whole, rel=1e-3)


def test_previous_checkpoint_is_used_when_the_last_was_altered(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"training": {"log_every": 1, "checkpoint_every": 2}}
    with pytest.raises(Stopped):
        train_encoder(LOCAL, dataset, tmp_path / "resumed", changes, StoppingLog)
    *_, before, last = sorted(tmp_path.glob("*.checkpoint/step-*"))
    (last / "shared.safetensors").write_bytes(b"")
    train_encoder(LOCAL, dataset, tmp_path / "resumed", changes)
    printed = capsys.readouterr().err
    assert f"encoder: altered, and passed over: {last.name}" in printed
    assert f"resumes from the checkpoint at step {int(before.name[5:])} of 20" in printed
    train_encoder(LOCAL, dataset, tmp_path / "whole", changes)
    assert (tmp_path / "resumed" / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()


def test_a_checkpoint_of_other_work_is_refused_and_kept(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train_encoder(LOCAL, dataset, out, EVERY_STEP, StoppingLog)
    changed = {"training": {**EVERY_STEP["training"], "learning_rate": 1e-3}}
    with pytest.raises(
        CommitError, match=r"out\.checkpoint: is a checkpoint of other work \(config: '\w+' there, '\w+'"
    ):
        train_encoder(LOCAL, dataset, out, changed)
    with pytest.raises(CommitError, match="is a checkpoint of other work"):
        train_encoder(LOCAL, dataset, out, {"training": {**EVERY_STEP["training"], "checkpoint_every": 0}})
    shutil.rmtree(tmp_path / "out.checkpoint")
    train_encoder(LOCAL, dataset, out, changed)
    assert json.loads((out / "summary.json").read_text())["resumed_from_step"] is None


def test_no_checkpoints_are_written_when_disabled(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_encoder(
            LOCAL, dataset, tmp_path / "out", {"training": {"log_every": 1, "checkpoint_every": 0}}, StoppingLog
        )
    assert list(tmp_path.iterdir()) == []


def launched(dataset: Path, config: Path, out: Path, threads: int = 1) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "sidestack.encoder.train",
        "--config",
        config,
        "--input",
        f"dataset={dataset}",
        "--out",
        out,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=environment)


def killed_after_a_checkpoint(folder: Path, epochs: int) -> tuple[Path, Path, Path]:
    """Kill a training after its first checkpoint; return dataset, configuration and the path of the missing output."""
    dataset, config, out = folder / "dataset", folder / "run.yaml", folder / "out"
    with committing(dataset, LOCAL, stage="prepare") as staging:
        write_dataset(staging)
    training = {"epochs": epochs, "checkpoint_every": 37}
    config.write_text(yaml.safe_dump({"encoder": merged(ENCODER, {"training": training})}))
    killed = launched(dataset, config, out)
    while not list(folder.glob("out.checkpoint/step-*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    return dataset, config, out


@pytest.mark.whole
def test_command_line_resumes_after_a_kill(tmp_path: Path) -> None:
    dataset, config, out = killed_after_a_checkpoint(tmp_path, epochs=60)
    for place in (out, tmp_path / "whole"):
        process = launched(dataset, config, place)
        _, printed = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        assert ("encoder: resumes from the checkpoint at step " in printed) == (place == out)
        assert "resumed_with_other" not in read_manifest(place).facts
    assert (out / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert rows(out) == rows(tmp_path / "whole")
    assert not (tmp_path / "out.checkpoint").exists()


@pytest.mark.slow
def test_manifest_records_a_resume_with_other_threads(tmp_path: Path) -> None:
    dataset, config, out = killed_after_a_checkpoint(tmp_path, epochs=20)
    process = launched(dataset, config, out, threads=2)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "with other threads: last bits may differ" in printed
    assert read_manifest(out).facts["resumed_with_other"] == ["threads"]
