"""The `tune` section: the settings that every arm is tried with."""

import itertools
from collections.abc import Iterator

from pydantic import Field, PositiveFloat

from infra.config import Config

INPUT = "arm."
"""Begins the name of every training among the inputs of the stage that chooses."""


class Setting(Config):
    """What an arm may have for itself."""

    sparse_learning_rate: PositiveFloat
    dense_learning_rate: PositiveFloat

    @property
    def name(self) -> str:
        """A short name that a stage may have, such as `sparse0.05_dense0.001`."""
        return f"sparse{self.sparse_learning_rate:g}_dense{self.dense_learning_rate:g}"


class TuneConfig(Config):
    """Section `tune`; every arm gets the whole grid, so no arm is tuned more than another.

    Settings are held against each other on the validation dates of `ranker.holdout`; test dates are not read.
    """

    sparse_learning_rates: tuple[PositiveFloat, ...] = Field(default=(0.025, 0.05, 0.1), min_length=1)
    """Of the embedding tables."""
    dense_learning_rates: tuple[PositiveFloat, ...] = Field(default=(0.0005, 0.001, 0.002), min_length=1)
    """Of everything else."""

    def settings(self) -> Iterator[Setting]:
        """Return the grid."""
        for sparse, dense in itertools.product(self.sparse_learning_rates, self.dense_learning_rates):
            yield Setting(sparse_learning_rate=sparse, dense_learning_rate=dense)
