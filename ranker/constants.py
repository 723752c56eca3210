"""Constants that the model needs beside the events: codebooks, raw embeddings, dense features' moments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_codebook import read_codebook
from sidestack.infra.checks import check_content
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import DatasetSpec, Entity


@dataclass(frozen=True)
class ModelConstants:
    """Constants of the model, the same on every rank.

    Attributes:
        codebooks: by the SIDs' name, float32 [digits, radix, latent_dim].
        embeddings: the items' or users' embeddings concatenated, float16 [rows, width]. Each signal is scaled to mean
            square 1 over the rows that have it; zeros where it is missing.
        scales: by entity and signal, the factor of that scaling.
        dense_2F: mean and 1 / standard deviation of the dense features (`ranker.scaling`), float32 [2, F]; None: dense
            features are not standardized.
    """

    codebooks: Mapping[str, Tensor] = field(default_factory=dict)
    embeddings: Mapping[Entity, Tensor] = field(default_factory=dict)
    scales: Mapping[Entity, Mapping[str, float]] = field(default_factory=dict)
    dense_2F: Tensor | None = None


class NeededConstants(NamedTuple):
    """The constants that an arm's content needs; none for most arms.

    Attributes:
        codebooks: the sets of SIDs whose codebooks it needs.
        embeddings: by entity, the signals whose raw embeddings it takes, and their dimensions.
    """

    codebooks: tuple[SidSpec, ...]
    embeddings: Mapping[Entity, Mapping[str, int]]


def read_constants(dataset: Dataset, needed: NeededConstants) -> ModelConstants:
    """Read the constants that an arm's content needs.

    Raises:
        DataError: a codebook or an embedding cannot be read, or breaks its contract.
        SpecError: a codebook is another encoder's.
    """
    read = {entity: read_embeddings(dataset, entity, signals) for entity, signals in needed.embeddings.items()}
    return ModelConstants(
        {sid.name: read_codebook(dataset.path, sid) for sid in needed.codebooks},
        {entity: embeddings_IE for entity, (embeddings_IE, _) in read.items()},
        {entity: scales for entity, (_, scales) in read.items()},
    )


def shaped_constants(needed: NeededConstants, spec: DatasetSpec) -> ModelConstants:
    """Return the constants of `read_constants` on the meta device, without values, for a dry run.

    A codebook's width is not in the spec; the number of digits is used, as for codes of one line.
    """
    books = {sid.name: (sid.digits, sid.radix, sid.digits) for sid in needed.codebooks}
    raw = {entity: (spec.content(entity).rows, sum(signals.values())) for entity, signals in needed.embeddings.items()}
    return ModelConstants(
        {name: torch.empty(shape, device="meta") for name, shape in books.items()},
        {entity: torch.empty(shape, device="meta", dtype=torch.half) for entity, shape in raw.items()},
    )


def read_embeddings(dataset: Dataset, entity: Entity, signals: Mapping[str, int]) -> tuple[Tensor, dict[str, float]]:
    """Read the items' or users' embeddings, signals concatenated, and their scales; see `ModelConstants`.

    Raises:
        DataError: a row breaks the table's contract.
    """
    content = dataset.spec.content(entity)
    whole_IE = np.zeros((content.rows, sum(signals.values())), np.float16)
    ends = np.cumsum([0, *signals.values()])
    for group in row_groups([file.path for file in dataset.content_files(entity)]):
        table = read_row_group(group, (content.id_column, *signals))
        check_content(table, content, group)
        ids_N = table[content.id_column].to_numpy()
        whole_IE[ids_N] = 0  # a later part replaces an item's earlier embeddings
        for start, (name, width) in zip(ends[:-1], signals.items(), strict=True):
            column = table[name].combine_chunks()
            present_N = column.is_valid().to_numpy(zero_copy_only=False)
            values = column.flatten().to_numpy(zero_copy_only=False)
            whole_IE[ids_N[present_N], start : start + width] = values.reshape(-1, width)
    scales = {
        name: _to_unit_mean_square(whole_IE[:, start : start + width])
        for start, (name, width) in zip(ends[:-1], signals.items(), strict=True)
    }
    return torch.from_numpy(whole_IE), scales


def _to_unit_mean_square(values_IE: npt.NDArray[np.float16]) -> float:
    """Scale values in place to mean square 1, and return the factor; 1 if all are zeros."""
    present_I = values_IE.any(axis=1)
    squares = sum(float(np.square(part, dtype=np.float32).sum()) for part in np.array_split(values_IE, 64))
    scale = np.float16(np.sqrt(present_I.sum() * values_IE.shape[1] / squares) if squares else 1)
    values_IE *= scale
    return float(scale)
