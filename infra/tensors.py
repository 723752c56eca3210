"""Tensors on disk, as safetensors: no pickle is ever loaded."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name into a file, and words about them into its header.

    By Python's own writing, not by `safetensors.torch.save_file`: that one makes the file readable by its owner alone,
    and calls a full disk by an error of its own.

    Raises:
        OSError: the file cannot be written.
    """
    # Contiguous copies: safetensors refuses views of a shared storage, which the tensors of a model may be.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    file.write_bytes(save(whole, dict(metadata) if metadata else None))
