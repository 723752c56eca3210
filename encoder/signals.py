"""Content signals: the signals that an encoder takes, and rows of the items or users as tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sidestack.infra.checks import check_content
from sidestack.infra.config import Config
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.parquet import RowGroup, open_parquet, restored_schema
from sidestack.infra.rows import Check
from sidestack.infra.snapshot import Dataset
from sidestack.infra.tables import DatasetSpec, Entity

CATEGORICAL_WEIGHT = 0.1

Precision = Literal["float16", "float32", "float64"]
"""The precision in which a table stores an embedding."""

TensorMap = Callable[[Tensor], Tensor]


class SignalSpec(Config):
    """The signals an encoder takes, in the order of its network's parts."""

    entity: Entity = "item"
    """The entity that has these signals."""
    embeddings: dict[str, int]
    """Embedding signals: name -> dimensions."""
    categoricals: dict[str, int]
    """Categorical signals: name -> cardinality."""
    weights: dict[str, float]
    """Weight of every signal's loss."""

    @property
    def names(self) -> tuple[str, ...]:
        """All signals, embeddings first."""
        return (*self.embeddings, *self.categoricals)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the items or users that hold the signals, and the id column."""
        return (self.id_column, *self.names)

    @property
    def id_column(self) -> str:
        """The name of the id column."""
        return f"{self.entity}_id"

    def require(self, spec: DatasetSpec, path: Path) -> None:
        """Check that a dataset has these signals, in these sizes.

        Raises:
            DataError: a signal is missing or of another size; names dataset, signal and both sizes.
        """
        content = spec.content(self.entity)
        offered = {**content.embeddings, **content.categoricals}
        for name, size in {**self.embeddings, **self.categoricals}.items():
            if offered.get(name) != size:
                raise DataError(f"{path}: signal {name!r} has size {offered.get(name)}, the encoder takes {size}")


def chosen_signals(weights: Mapping[str, float], spec: DatasetSpec, entity: Entity = "item") -> SignalSpec:
    """Choose signals of a dataset's items or users by their weights; empty weights mean all signals.

    Raises:
        ConfigError: a name is not a signal of the dataset, or there is no signal at all.
    """
    content = spec.content(entity)
    if not weights:
        weights = dict.fromkeys(content.embeddings, 1.0) | dict.fromkeys(content.categoricals, CATEGORICAL_WEIGHT)
    known = [*content.embeddings, *content.categoricals]
    for name in weights:
        if name not in known:
            raise ConfigError(
                f"encoder.signals.{name}: not a signal of the dataset's {entity}s; they have {', '.join(known)}"
            )
    if not weights:
        raise ConfigError(f"encoder.signals: the dataset's {entity}s have no content signal to encode")
    return SignalSpec(
        entity=entity,
        embeddings={name: dim for name, dim in content.embeddings.items() if name in weights},
        categoricals={name: number for name, number in content.categoricals.items() if name in weights},
        weights=dict(weights),
    )


@dataclass(frozen=True)
class SignalBatch:
    """Rows of items or users as tensors.

    Attributes:
        embeddings: name -> float32 [B, dim]; zeros where missing.
        categoricals: name -> int64 [B]; 0 where missing.
        present: name -> bool [B]; False where the signal is missing (null).
    """

    embeddings: dict[str, Tensor]
    categoricals: dict[str, Tensor]
    present: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    @property
    def any_present(self) -> Tensor:
        """Whether each row has any signal, bool [B]; a row without signals gets a null SID."""
        return torch.stack(list(self.present.values())).any(0)

    def to(self, device: torch.device) -> "SignalBatch":
        """Move to a device."""
        return self._mapped(lambda x: x.to(device))

    def padded(self, rows: int) -> "SignalBatch":
        """Append rows without signals, up to a total of `rows`."""
        missing = rows - len(self)
        if not missing:
            return self
        return self._mapped(lambda x: torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))

    def blocks(self, rows: int) -> Iterator["SignalBatch"]:
        """Split into blocks of `rows` rows; the last may be shorter."""
        for start in range(0, len(self), rows):
            yield self.sliced(start, start + rows)

    def sliced(self, start: int, stop: int) -> "SignalBatch":
        """Return the rows in [start, stop)."""
        return self._mapped(lambda x: x[start:stop])

    def with_present(self, present: dict[str, Tensor]) -> "SignalBatch":
        """Return the same rows with other signals present; what is not present is never read."""
        return SignalBatch(self.embeddings, self.categoricals, present)

    def repeated(self, times: int) -> "SignalBatch":
        """Repeat every row `times` times, with its copies adjacent."""
        return self._mapped(lambda x: x.repeat_interleave(times, 0))

    def _mapped(self, function: TensorMap) -> Self:
        parts = (self.embeddings, self.categoricals, self.present)
        return type(self)(*({name: function(x) for name, x in part.items()} for part in parts))


def signal_batch(table: pa.Table, signals: SignalSpec) -> SignalBatch:
    """Convert rows of items or users to tensors; the table must have passed `signal_check`."""
    embeddings, categoricals, present = {}, {}, {}
    for name, dim in signals.embeddings.items():
        column = table[name].combine_chunks()
        present[name] = _validity(column)
        embeddings[name] = _embedding(column, dim, present[name])
    for name in signals.categoricals:
        column = table[name].combine_chunks()
        present[name] = _validity(column)
        categoricals[name] = torch.from_numpy(column.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))
    return SignalBatch(embeddings, categoricals, present)


def concatenated(batches: list[SignalBatch]) -> SignalBatch:
    """Concatenate batches of the same signals along the rows."""
    first = batches[0]

    def joined(part: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(batch, part)[name] for batch in batches]) for name in getattr(first, part)}

    return SignalBatch(joined("embeddings"), joined("categoricals"), joined("present"))


def signal_check(spec: DatasetSpec, entity: Entity = "item") -> Check:
    """Return the check for input rows: types, finite embeddings, categoricals in range.

    The check raises DataError naming file, row group, signal and rule.
    """

    def check(table: pa.Table, where: RowGroup) -> None:
        check_content(table, spec.content(entity), where)

    return check


def _embedding(column: pa.FixedSizeListArray, dim: int, present_B: Tensor) -> Tensor:
    """Return float32 [B, dim], zeros where missing; torch converts float16, 20 times as fast as numpy."""
    # flatten() leaves out the slots of nulls, whose bytes are arbitrary.
    known_ND = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    if not len(known_ND):
        return torch.zeros(len(present_B), dim)
    rows_B = np.maximum(np.cumsum(present_B.numpy()) - 1, 0)
    x_BD = torch.from_numpy(known_ND.take(rows_B, axis=0, mode="clip")).float()
    x_BD[~present_B] = 0
    return x_BD


def _validity(column: pa.Array) -> Tensor:
    return torch.from_numpy(column.is_valid().to_numpy(zero_copy_only=False))


def stored_precisions(dataset: Dataset, signals: SignalSpec) -> dict[str, Precision]:
    """Return the precision in which a snapshot's table stores each embedding of some signals.

    Raises:
        DataError: the table's first file cannot be read.
    """
    (file, *_) = dataset.content_files(signals.entity)
    with open_parquet(file.path) as opened:
        schema = restored_schema(opened.schema_arrow)
    return {name: schema.field(name).type.value_type.to_pandas_dtype().__name__ for name in signals.embeddings}
