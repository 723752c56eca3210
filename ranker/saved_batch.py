"""A batch with a non-finite loss on disk, for `ranker.replay_batch`.

A rank whose rows made the loss non-finite saves its part of the batch beside the output, in `<out>.nonfinite/`:
tensors as safetensors, and in a JSON file the trained arm, the inputs, and the path of the checkpoints.
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
        message: the error's message. ranker: the arm that was trained.
        dataset: the snapshot. checkpoints: the folder of the training's checkpoints; empty: there is none.
        keys: the features of each group of ids to look up, in order.
    """

    message: str
    ranker: Description
    dataset: str
    checkpoints: str
    keys: dict[str, tuple[str, ...]]


@contextlib.contextmanager
def saved_if_not_finite(run: StageRun[RankerConfig], ranker: Description) -> Iterator[None]:
    """Save the batch if a loss in the body is non-finite, on the ranks whose rows are the cause.

    Raises:
        NonFiniteLossError: the body's error, with the folder in its message.
    """
    try:
        yield
    except NonFiniteLossError as error:
        if run.target is None:
            raise
        folder = run.target.with_name(f"{run.target.name}.nonfinite")
        have = gather(run.world, error.is_own)
        message = f"{error}; see python -m sidestack.ranker.replay_batch {folder}"
        if error.is_own or not any(have):
            checkpoints = "" if run.checkpoints is None else address(run.checkpoints.path)
            dataset = address(run.inputs["dataset"].absolute())
            try:
                _save(folder, run.world, error, ranker, dataset, checkpoints)
            except OSError as fault:  # the loss is the more important error
                message = f"{error}; the batch could not be saved in {folder}: {fault}"
        raise NonFiniteLossError(message, error.batch, error.is_own) from error


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
    """Return the ranks that saved a batch in a folder."""
    return sorted(int(file.stem.removeprefix("rank-")) for file in folder.glob("rank-*.json"))


def read_batch(folder: Path, rank: int) -> tuple[SavedBatch, RankerBatch]:
    """Read the batch that a rank saved.

    Raises:
        DataError: there is none, or it was saved by another version.
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
