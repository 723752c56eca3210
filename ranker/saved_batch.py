"""A batch on disk: the one whose loss was not finite, as `ranker.replay_batch` takes it.

A rank whose rows made the loss not finite leaves its part of the batch beside the output, in `<out>.nonfinite/`:
tensors as safetensors, and in a JSON file the trained arm, the inputs, and where the checkpoints are.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchrec import KeyedJaggedTensor

from sidestack.infra.config import Config
from sidestack.infra.distributed import World, gather
from sidestack.infra.errors import DataError
from sidestack.infra.remote.urls import address
from sidestack.infra.stage import StageRun
from sidestack.infra.tensors import write_tensors
from sidestack.ranker.batch import RankerBatch
from sidestack.ranker.bundle_description import Description
from sidestack.ranker.config import RankerConfig
from sidestack.ranker.layout import history_layout
from sidestack.ranker.loss_check import NonFiniteLossError

_JAGGED = ("bags", "request_bags", "sequences")


class SavedBatch(Config):
    """The content of the JSON file.

    Attributes:
        message: what was said of the loss. ranker: the arm that was trained.
        dataset: the snapshot. checkpoints: the folder that has those of the training, if there were any.
        keys: of the ids to look up, the features by name, in order.
    """

    message: str
    ranker: Description
    dataset: str
    checkpoints: str
    keys: dict[str, tuple[str, ...]]


@contextlib.contextmanager
def saved_if_not_finite(run: StageRun[RankerConfig], ranker: Description) -> Iterator[None]:
    """Save the batch where a loss in the body is not finite, on the ranks whose rows are the cause.

    Raises:
        NonFiniteLossError: as the body does; it names the folder.
    """
    try:
        yield
    except NonFiniteLossError as error:
        if run.target is None:
            raise
        folder = run.target.with_name(f"{run.target.name}.nonfinite")
        have = gather(run.world, error.is_own)
        told = f"{error}; see python -m sidestack.ranker.replay_batch {folder}"
        if error.is_own or not any(have):
            checkpoints = "" if run.checkpoints is None else address(run.checkpoints.path)
            dataset = address(run.inputs["dataset"].absolute())
            try:
                _save(folder, run.world, error, ranker, dataset, checkpoints)
            except OSError as fault:  # what the loss is matters more
                told = f"{error}; the batch could not be saved in {folder}: {fault}"
        raise NonFiniteLossError(told, error.batch, error.is_own) from error


def _save(
    folder: Path, world: World, error: NonFiniteLossError, ranker: Description, dataset: str, checkpoints: str
) -> None:
    batch = error.batch()
    own = {one.name: getattr(batch, one.name) for one in fields(batch)}
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    for name in _JAGGED:
        tensors |= {f"{name}.values": own[name].values(), f"{name}.lengths": own[name].lengths()}
    keys = {name: tuple(own[name].keys()) for name in _JAGGED}
    saved = SavedBatch(message=str(error), ranker=ranker, dataset=dataset, checkpoints=checkpoints, keys=keys)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, _tensors(folder, world.rank))
    _words(folder, world.rank).write_text(saved.model_dump_json(indent=1) + "\n", encoding="utf-8")


def saved_ranks(folder: Path) -> list[int]:
    """Return the ranks that have left a batch in a folder."""
    return sorted(int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.json"))


def read_batch(folder: Path, rank: int) -> tuple[SavedBatch, RankerBatch]:
    """Read what a rank has left.

    Raises:
        DataError: it has left nothing, or nothing of this version.
    """
    try:
        saved = SavedBatch.model_validate_json(_words(folder, rank).read_bytes())
        tensors = load_file(_tensors(folder, rank))
        jagged = {
            name: KeyedJaggedTensor(
                keys=list(saved.keys[name]),
                values=tensors.pop(f"{name}.values"),
                lengths=tensors.pop(f"{name}.lengths"),
            )
            for name in _JAGGED
        }
        rows_R = torch.bincount(tensors["request_B"], minlength=len(tensors["history_lengths_R"]))
        layout = history_layout(tensors["history_lengths_R"].numpy(), rows_R.numpy())
        return saved, RankerBatch(**jagged, **tensors, layout=layout)
    except (OSError, ValidationError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: holds no batch of rank {rank}: {error}") from error


def _tensors(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.safetensors"


def _words(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
