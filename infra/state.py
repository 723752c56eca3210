"""A model's state on disk: replicated tensors in one file, sharded tensors in global coordinates.

All files are safetensors, so that no pickle is ever loaded. Any number of ranks can read what any number wrote.
Checkpoints of a running stage and finished models both have this form.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sidestack.infra.shards import Shards, read_shards, write_shards
from sidestack.infra.tensors import write_tensors

SHARED_FILE = "shared.safetensors"
SHARDS_FOLDER = "shards"


def write_state(folder: Path, shared: Mapping[str, Tensor], shards: Shards, rank: int) -> None:
    """Write a rank's part of a state into a folder that all ranks share.

    Args:
        folder: an existing folder. shared: tensors that are the same on every rank; rank 0's are written.
        shards: tensors that are sharded over the ranks. rank: this rank.

    Raises:
        OSError: a file cannot be written.
    """
    if shards:
        write_shards(shards, folder / SHARDS_FOLDER, rank)
    if rank == 0:
        write_tensors(dict(shared), folder / SHARED_FILE)


def read_state(folder: Path, shards: Shards) -> dict[str, Tensor]:
    """Return the tensors that are the same on every rank, and fill this rank's parts of the others in place.

    Raises:
        OSError, SafetensorError: a file cannot be read.
        ValueError: a tensor was not saved, or with another shape.
    """
    read_shards(shards, folder / SHARDS_FOLDER)
    shared: dict[str, Tensor] = load_file(folder / SHARED_FILE)
    return shared


def fill(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved tensors into others of the same names, in place.

    Raises:
        ValueError: a tensor was not saved, or with another shape.
    """
    for name, tensor in tensors.items():
        if name not in saved:
            raise ValueError(f"{name}: was not saved")
        if saved[name].shape != tensor.shape:
            raise ValueError(f"{name}: was saved with shape {tuple(saved[name].shape)}, now has {tuple(tensor.shape)}")
        tensor.copy_(saved[name])
