"""Mean and standard deviation of the dense features over training rows, for their standardization."""

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidestack.infra.distributed import World, broadcast, raise_on_all_ranks
from sidestack.ranker.blocks import compressed
from sidestack.ranker.id_tables import MAX_ROWS, sample_rows
from sidestack.ranker.reader import Split, check_rows

Floats = npt.NDArray[np.float64]


class Moments:
    """Running count, mean and sum of squared deviations of each column (Chan et al.), in float64."""

    def __init__(self, num: int) -> None:
        self.rows = 0
        self.mean_F: Floats = np.zeros(num)
        self.squares_F: Floats = np.zeros(num)

    def add(self, values_NF: Floats) -> None:
        """Add rows, at least one."""
        rows = len(values_NF)
        mean_F = values_NF.mean(axis=0)
        apart_F, total = mean_F - self.mean_F, self.rows + rows
        self.squares_F += np.square(values_NF - mean_F).sum(axis=0) + apart_F**2 * self.rows * rows / total
        self.mean_F += apart_F * rows / total
        self.rows = total

    def scale(self) -> Floats:
        """Return 1 / standard deviation; 1 for a column that does not vary."""
        spread_F = np.sqrt(self.squares_F / max(self.rows, 1))
        varies_F = spread_F > 1e-6 * np.maximum(np.abs(self.mean_F), 1)
        return np.where(varies_F, 1 / np.where(varies_F, spread_F, 1), 1.0)


def dense_moments(split: Split, world: World, max_rows: int = MAX_ROWS) -> Tensor | None:
    """Return mean and 1 / standard deviation of the compressed dense features, float32 [2, F]; None: there are none.

    Rank 0 reads the rows in order, so the result is the same for any number of ranks. Every rank must call.

    Args:
        split: the training rows. world: the process group.
        max_rows: with more rows than this, a sample is read, by whole row groups.

    Raises:
        DataError: rows break the contract.
    """
    names = split.features.dense
    if not names:
        return None
    moments = Moments(len(names))
    check = partial(check_rows, features=split.features, spec=split.dataset.spec)
    with raise_on_all_ranks(world, "reading the dense features"):
        if world.is_main:
            for table in sample_rows(split, names, max_rows, check):
                values_NF = np.stack([table[name].to_numpy() for name in names], axis=1)
                moments.add(compressed(torch.from_numpy(values_NF)).double().numpy())
    mean_F, scale_F = broadcast(world, (moments.mean_F, moments.scale()))
    return torch.from_numpy(np.stack([mean_F, scale_F]).astype(np.float32))
