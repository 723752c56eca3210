"""A training that was stopped in mid-epoch and started again gives the bytes of one that was not."""

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
from typing import Any, get_args

import pytest
import yaml

from encoder.bundle import WEIGHTS_FILE
from encoder.quantizers import QuantizerConfig
from infra.commit import committing
from infra.distributed import World
from infra.errors import CommitError, PreemptedError
from infra.tracking import RunLog
from tests.distributed import run_distributed
from tests.encoder.fabricated import ENCODER, LOCAL, merged, train_encoder, write_dataset

# 10 steps an epoch; the codebook is set at steps 0, 1, 2, 4 and 6 of 20.
EVERY_STEP = {"training": {"log_every": 1, "checkpoint_every": 4}}
TIMES = {"train/items_per_second", "train/data_wait_share"}


class Stopped(Exception):
    """What ends a training here."""


class StoppingLog(RunLog):
    """Ends the training as step 7, in mid-epoch, is recorded: three steps after a checkpoint."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            raise Stopped


class KillingLog(RunLog):
    """Kills its process as step 7 is recorded."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


class AskingLog(RunLog):
    """Asks its rank to stop as step 7 is recorded, as a signal does."""

    world: World

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        if step == 7:
            self.world.state.ask_to_stop("SIGTERM")


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the history without what tells the time."""
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
def test_one_rank_goes_on_bit_for_bit(dataset: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
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
def test_more_ranks_go_on_bit_for_bit_after_a_kill(dataset: Path, tmp_path: Path, ranks: int) -> None:
    """Four ranks are more than two: a sum of three or more numbers depends on the order they are added in."""
    with pytest.raises(BrokenProcessPool):
        run_distributed(
            train_encoder, dataset, tmp_path / "resumed", EVERY_STEP, KillingLog, world_size=ranks, timeout_s=20
        )
    run_distributed(train_both, dataset, tmp_path, world_size=ranks)
    require_equal(tmp_path / "resumed", tmp_path / "whole")


def stop_and_train_both(world: World, dataset: Path, folder: Path, changes: dict[str, Any]) -> int | None:
    """Train with a request to stop one rank, and without; return the step that was saved."""
    AskingLog.world = world
    with pytest.raises(PreemptedError, match="preempted at step") as stop:
        train_encoder(world, dataset, folder / "resumed", changes, AskingLog)
    assert not (folder / "resumed").exists()
    world.state.signal, world.state.asked_at, world.state.must_stop = None, None, False
    for name in ("resumed", "whole"):
        train_encoder(world, dataset, folder / name, changes)
    return stop.value.step


STOPPED = 11
"""The request comes in step 7, and travels with the next batch: the first ten were read for the sample."""
KINDS = [kind.model_fields["kind"].default for kind in get_args(get_args(QuantizerConfig)[0])]
SMALL = {
    "structured": {"groups": 2, "depth": 3, "group_dim": 4},
    "rqvae": {"codes": 8, "depth": 3, "group_dim": 8},
    "residual_kmeans": {"codes": 8, "depth": 3, "group_dim": 8},
    "product": {"codes": 8},
    "topk_kmeans": {"clusters": 16, "k": 3, "latent_dim": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_to_stop_saves_the_step_at_which_all_ranks_know(dataset: Path, tmp_path: Path, kind: str) -> None:
    quantizer = {"kind": kind, **SMALL.get(kind, {})}
    changes = {"training": {"log_every": 1, "revive_every": 3}, "quantizer": quantizer}
    assert stop_and_train_both(LOCAL, dataset, tmp_path, changes) == STOPPED
    require_equal(tmp_path / "resumed", tmp_path / "whole", step=STOPPED)


def test_a_request_to_stop_one_rank_saves_one_step_of_all(dataset: Path, tmp_path: Path) -> None:
    saved = run_distributed(stop_and_train_both, dataset, tmp_path, {"training": {"log_every": 1}}, world_size=2)
    assert saved == [STOPPED, STOPPED]
    require_equal(tmp_path / "resumed", tmp_path / "whole", step=STOPPED)


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


def test_no_checkpoints_where_none_are_asked_for(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_encoder(
            LOCAL, dataset, tmp_path / "out", {"training": {"log_every": 1, "checkpoint_every": 0}}, StoppingLog
        )
    assert list(tmp_path.iterdir()) == []


def launched(dataset: Path, config: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "encoder.train", "--config", config, "--input", f"dataset={dataset}", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_the_command_line_goes_on_after_a_kill(tmp_path: Path) -> None:
    dataset, config, out = tmp_path / "dataset", tmp_path / "run.yaml", tmp_path / "out"
    with committing(dataset, LOCAL, stage="prepare") as staging:
        write_dataset(staging)
    training = {"epochs": 60, "checkpoint_every": 37}
    config.write_text(yaml.safe_dump({"encoder": merged(ENCODER, {"training": training})}))
    killed = launched(dataset, config, out)
    while not list(tmp_path.glob("out.checkpoint/step-*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    for place in (out, tmp_path / "whole"):
        process = launched(dataset, config, place)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert ("encoder: goes on from the checkpoint at step " in said) == (place == out)
    assert (out / WEIGHTS_FILE).read_bytes() == (tmp_path / "whole" / WEIGHTS_FILE).read_bytes()
    assert rows(out) == rows(tmp_path / "whole")
    assert not (tmp_path / "out.checkpoint").exists()
