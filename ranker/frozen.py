"""What content needs beside the events and never learns: the SIDs' codebooks, and the items' raw embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from encoder.sid import SidSpec
from encoder.sid_codebook import read_codebook
from infra.parquet import read_row_group, row_groups
from infra.tables import Dataset, check_items
from ranker.features import ArmFeatures


@dataclass(frozen=True)
class Frozen:
    """Constants of the model, the same on every rank.

    Attributes:
        codebooks: by the SIDs' name, float32 [digits, radix, latent_dim].
        embeddings_IE: the items' embeddings side by side, float16, each signal's entries with mean square 1 over the
            items that have it, zeros where it is missing; None where no content is `dense`.
    """

    codebooks: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings_IE: Tensor | None = None


def read_frozen(dataset: Dataset, features: ArmFeatures) -> Frozen:
    """Read what an arm's content needs; nothing for most arms.

    Raises:
        DataError: a codebook or an embedding cannot be read, or breaks its contract.
        SpecError: a codebook is another encoder's.
    """
    signals = _signals(features)
    return Frozen(
        {sid.name: read_codebook(dataset.path, sid) for sid in _with_lines(features)},
        None if signals is None else item_embeddings(dataset, signals),
    )


def shaped_frozen(features: ArmFeatures, num_items: int) -> Frozen:
    """Give the same without a value, on the meta device, for a dry run.

    A codebook's width is not in the spec; it is taken to be the number of digits, as it is for codes of one line.
    """
    signals = _signals(features)
    shapes = {sid.name: (sid.digits, sid.radix, sid.digits) for sid in _with_lines(features)}
    return Frozen(
        {name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        None if signals is None else torch.empty(num_items, sum(signals.values()), device="meta", dtype=torch.half),
    )


def _with_lines(features: ArmFeatures) -> list[SidSpec]:
    """Give the SIDs that are unpacked by their codebook."""
    contents = (features.item, features.history)
    return [sid for content in contents if content.kind == "side" for sid in content.sids if sid.lines > 1]


def _signals(features: ArmFeatures) -> Mapping[str, int] | None:
    """Give the embeddings that are content as they are; both positions take the same."""
    return next((content.embeddings for content in (features.item, features.history) if content.embeddings), None)


def item_embeddings(dataset: Dataset, signals: Mapping[str, int]) -> Tensor:
    """Read the items' embeddings, signals side by side; see `Frozen.embeddings_IE`.

    Raises:
        DataError: a row breaks the items' contract.
    """
    whole_IE = np.zeros((dataset.spec.num_items, sum(signals.values())), np.float16)
    ends = np.cumsum([0, *signals.values()])
    for group in row_groups(dataset.item_files):
        table = read_row_group(group, ("item_id", *signals))
        check_items(table, dataset.spec, group)
        for start, (name, width) in zip(ends[:-1], signals.items(), strict=True):
            column = table[name].combine_chunks()
            present_N = column.is_valid().to_numpy(zero_copy_only=False)
            values = column.flatten().to_numpy(zero_copy_only=False)
            rows_N = group.start + np.flatnonzero(present_N)
            whole_IE[rows_N, start : start + width] = values.reshape(-1, width)
    for start, width in zip(ends[:-1], signals.values(), strict=True):
        _to_unit_mean_square(whole_IE[:, start : start + width])
    return torch.from_numpy(whole_IE)


def _to_unit_mean_square(values_IE: npt.NDArray[np.float16]) -> None:
    present_I = values_IE.any(axis=1)
    squares = sum(float(np.square(part, dtype=np.float32).sum()) for part in np.array_split(values_IE, 64))
    if squares:
        values_IE *= np.float16(np.sqrt(present_I.sum() * values_IE.shape[1] / squares))
