"""A training that is stopped in mid-epoch and resumed writes the same bytes as an uninterrupted one."""

import json
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sidestack.ranker.trainer
from sidestack.infra.checkpoint import Checkpoints
from sidestack.infra.commit import committing
from sidestack.infra.config import plain
from sidestack.infra.distributed import World
from sidestack.infra.errors import CommitError, PreemptedError
from sidestack.infra.profile import StepProfile
from sidestack.infra.stage import StageRun
from sidestack.infra.state import SHARDS_FOLDER, SHARED_FILE
from sidestack.infra.tracking import RunLog
from sidestack.ranker.bundle import FOLDER
from sidestack.ranker.loss_check import NonFiniteLossError
from sidestack.ranker.train import train
from tests.distributed import run_distributed
from tests.ranker.dataset import write_dataset
from tests.ranker.training import config_of, named, not_a_number

# 32 steps per epoch, two epochs; stopped at step 43, in the second: three steps after a checkpoint.
TRAINING = {"epochs": 2, "checkpoint_every": 8, "log_every": 3}
STOP = 43


class Stopped(Exception):
    """Raised to stop a training."""


@contextmanager
def stopping(steps: int | None = None) -> Iterator[None]:
    """Stop trainings at step `STOP` on every rank; with `steps`, only trainings of that many steps."""
    kept = sidestack.ranker.trainer.learning_rates

    def rates(training: Any, step: int, total: int) -> tuple[float, float]:
        if step == STOP and steps in (None, total):
            raise Stopped
        return kept(training, step, total)

    sidestack.ranker.trainer.learning_rates = rates
    try:
        yield
    except Stopped:
        pass
    finally:
        sidestack.ranker.trainer.learning_rates = kept


def train_ranker(
    world: World,
    dataset: Path,
    out: Path,
    arm: str = "sid_ngram",
    start: Path | None = None,
    holdout: dict[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    profile: int = 0,
    **training: Any,
) -> None:
    """Run the stage's body and commit its output, as its main program does."""
    config = config_of(arm, training={**TRAINING, **training}, holdout=holdout or {}, model=dict(model or {}))
    inputs = {"dataset": dataset} if start is None else {"dataset": dataset, "start": start}
    facts: dict[str, Any] = {}
    checkpoints = Checkpoints(out.with_name(f"{out.name}.checkpoint"), world, "ranker", {}, config)
    with committing(out, world, stage="ranker", facts=facts) as staging:
        log = RunLog.open(world.rank, "ranker", staging, plain(config), {}, "", None)
        traced = StepProfile(profile, out.with_name(f"{out.name}.profile"), world.rank, log.info)
        train(StageRun(config, inputs, staging, world, log, facts, checkpoints, target=out, profile=traced))
    checkpoints.remove()


def both_ways(world: World, dataset: Path, folder: Path, kept: list[int], training: dict[str, Any]) -> None:
    """Train with a stop that leaves the checkpoints of the steps `kept`, and without a stop."""
    with stopping():
        train_ranker(world, dataset, folder / "resumed", **training)
    assert not (folder / "resumed").exists()
    assert kept_checkpoints(folder / "resumed") == [f"step-{step:012}" for step in kept]
    for name in ("resumed", "whole"):
        train_ranker(world, dataset, folder / name, **training)


def kept_checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.with_name(f"{out.name}.checkpoint").iterdir())


def stopped(world: World, dataset: Path, out: Path) -> None:
    with stopping():
        train_ranker(world, dataset, out)


def finish_both(world: World, dataset: Path, folder: Path) -> None:
    for name in ("moved", "whole"):
        train_ranker(world, dataset, folder / name)


def test_no_checkpoint_is_written_after_a_non_finite_loss(
    world: World, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidestack.ranker.blocks.DenseBlock.forward", not_a_number)
    with pytest.raises(NonFiniteLossError):
        train_ranker(world, dataset, tmp_path / "out", checkpoint_every=1)
    assert not (tmp_path / "out.checkpoint").exists()


def weights(out: Path) -> dict[str, Tensor]:
    """Return all weights and optimizer states of a finished training, assembled from their shards."""
    whole = load_file(out / FOLDER / SHARED_FILE)
    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file in (out / FOLDER / SHARDS_FOLDER).iterdir():
        for key, part in load_file(file).items():
            name, _, offset = key.rpartition("@")
            parts.setdefault(name, []).append(([int(at) for at in offset.split(",")], part))
    for name, found in parts.items():
        assert all(offset[1:] == [0] * (part.dim() - 1) for offset, part in found)  # shards hold whole rows
        whole[name] = torch.cat([part for _, part in sorted(found, key=lambda one: one[0])])
    return whole


def predictions(out: Path) -> pa.Table:
    return pq.read_table(out / "predictions").sort_by("row")


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("resume") / "dataset")


@pytest.mark.parametrize(
    ("ranks", "kept", "training"),
    [
        (1, [32, 40], {}),
        (2, [32, 40], {}),
        pytest.param(4, [32, 40], {}, marks=pytest.mark.slow),
        # The weights are averaged from step 33 on; tables restart after step 32, where the second epoch begins.
        (2, [32, 40], {"restart_tables": True, "average_share": 0.5}),
        (1, [32], {"restart_tables": True, "average_share": 0.5, "checkpoint_every": 32}),
    ],
)
def test_training_resumes_bit_for_bit(
    dataset: Path, tmp_path: Path, ranks: int, kept: list[int], training: dict[str, Any]
) -> None:
    run_distributed(both_ways, dataset, tmp_path, kept, training, world_size=ranks)
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert any("momentum1" in name for name in ours)
    assert any("exp_avg_sq" in name for name in ours)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert predictions(resumed).equals(predictions(whole))
    assert history(resumed) == history(whole)
    assert [row["step"] for row in history(whole) if "train_click_ne" in row] == [*range(3, 63, 3), 64]
    assert summary(resumed)["resumed_from_step"] == kept[-1]
    assert summary(whole)["resumed_from_step"] is None
    assert list(tmp_path.glob("*.checkpoint")) == []


def test_checkpoint_resumes_on_another_number_of_ranks_to_close_weights(dataset: Path, tmp_path: Path) -> None:
    run_distributed(stopped, dataset, tmp_path / "moved", world_size=2)
    run_distributed(finish_both, dataset, tmp_path, world_size=1)
    ours, theirs = weights(tmp_path / "moved"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    # The order of sums differs. Initial values lie within 1e-2, so that a restarted table would be detected.
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=named(name))
    assert summary(tmp_path / "moved")["resumed_from_step"] == 40


def other_work(world: World, dataset: Path, out: Path) -> tuple[str, str]:
    """Stop a training, then train with other settings in its place; return the errors."""
    stopped(world, dataset, out)
    messages = []
    for changes in ({"sparse_learning_rate": 0.01}, {"checkpoint_every": 0}):
        try:
            train_ranker(world, dataset, out, **changes)
        except CommitError as error:
            messages.append(str(error))
    return tuple(messages)  # type: ignore[return-value]


def test_a_checkpoint_of_other_work_is_refused_and_kept(dataset: Path, tmp_path: Path) -> None:
    (messages,) = run_distributed(other_work, dataset, tmp_path / "out", world_size=1)
    assert len(messages) == 2
    for message in messages:
        assert "out.checkpoint: is a checkpoint of other work (config: " in message
    assert kept_checkpoints(tmp_path / "out") == ["step-000000000032", "step-000000000040"]


def train_with_and_without_request(
    world: World, dataset: Path, folder: Path, where: str, training: dict[str, Any]
) -> int:
    """Train with a request to stop one rank at some place, and without; return the step that was saved."""
    place = {"train": "sidestack.ranker.trainer.learning_rates", "predict": "sidestack.ranker.train.predict",
             "measure": "sidestack.ranker.validation.measure_ne"}[where]  # fmt: skip
    kept = pkgutil.resolve_name(place)

    def with_request(*args: Any) -> Any:
        if world.is_main and (where != "train" or args[1] == STOP):
            world.state.ask_to_stop("SIGTERM")
        return kept(*args)

    patch = pytest.MonkeyPatch()
    patch.setattr(place, with_request)
    with pytest.raises(PreemptedError, match="preempted at step") as stop:
        train_ranker(world, dataset, folder / "resumed", **training)
    patch.undo()
    assert not (folder / "resumed").exists()
    world.state.signal, world.state.asked_at, world.state.must_stop = None, None, False
    for name in ("resumed", "whole"):
        train_ranker(world, dataset, folder / name, **training)
    return stop.value.step


@pytest.mark.parametrize(
    ("where", "steps", "training"),
    [
        ("train", (STOP, STOP + 3), {"restart_tables": True, "average_share": 0.5}),
        ("predict", (64, 64), {"average_share": 0.5}),
        ("measure", (24, 24), {"epochs": 3, "validation_days": 1}),
    ],
)
def test_stop_request_to_one_rank_saves_the_same_step_on_all(
    dataset: Path, tmp_path: Path, where: str, steps: tuple[int, int], training: dict[str, Any]
) -> None:
    # With a checkpoint every 100 steps, the one that the training resumes from is that of the request.
    changes = {**training, "checkpoint_every": 100}
    saved, same = run_distributed(train_with_and_without_request, dataset, tmp_path, where, changes, world_size=2)
    assert saved == same
    assert steps[0] <= saved <= steps[1]
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert predictions(resumed).equals(predictions(whole))
    assert history(resumed) == history(whole)
    assert list(tmp_path.glob("*.checkpoint")) == []
