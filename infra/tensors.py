"""Tensors on disk, as safetensors: no pickle is ever loaded."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name into a file, and metadata into its header.

    Written by Python, not by `safetensors.torch.save_file`: that makes the file readable only by its owner, and raises
    an error of its own for a full disk.

    Raises:
        OSError: the file cannot be written.
    """
    # Contiguous copies: safetensors refuses views of a shared storage, and a model's tensors may be such views.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    file.write_bytes(save(whole, dict(metadata) if metadata else None))
