"""The `tune` section: the grid of settings for every arm, and the length of trainings."""

import itertools
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveFloat, model_validator

from sidestack.infra.config import Config
from sidestack.ranker.config import SearchBudget

INPUT = "arm."
"""Prefix of the trainings' names in the inputs of stage `tune`."""
Share = Annotated[float, Field(gt=0, le=1)]

RUNGS: dict[SearchBudget, tuple[Share, ...]] = {
    "quick": (0.125,),
    "standard": (0.125, 0.25),
    "thorough": (1.0,),
}
"""`ranker.budget` -> the rungs' shares of a full training's steps. With nine settings, an arm's search costs 1.1, 2.4
and 9 full trainings."""


class LearningRates(Config):
    """Settings that are tuned per arm."""

    sparse_learning_rate: PositiveFloat
    dense_learning_rate: PositiveFloat

    @property
    def name(self) -> str:
        """A short name, valid for a stage, such as `sparse0.05_dense0.001`."""
        return f"sparse{self.sparse_learning_rate:g}_dense{self.dense_learning_rate:g}"


class TuneConfig(Config):
    """Section `tune`; every arm gets the whole grid and the same steps, so no arm is tuned more than another.

    The search is successive halving: each rung trains the remaining settings for its share of the steps, and the better
    half of each arm advances to the next. Settings are compared on the validation dates of `ranker.holdout`; test dates
    are not read.
    """

    sparse_learning_rates: tuple[PositiveFloat, ...] = Field(default=(0.003, 0.0125, 0.05), min_length=1)
    """Learning rates of the embedding tables."""
    dense_learning_rates: tuple[PositiveFloat, ...] = Field(default=(0.001, 0.002, 0.004), min_length=1)
    """Learning rates of all other parameters."""
    rungs: tuple[Share, ...] | None = Field(default=None, min_length=1)
    """The rungs' shares of a full training's steps, increasing; by default set by `ranker.budget`."""

    @model_validator(mode="after")
    def _check_rungs(self) -> "TuneConfig":
        if self.rungs is not None and list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs={list(self.rungs)} must rise")
        return self

    def settings(self) -> Iterator[LearningRates]:
        """Return the grid."""
        for sparse, dense in itertools.product(self.sparse_learning_rates, self.dense_learning_rates):
            yield LearningRates(sparse_learning_rate=sparse, dense_learning_rate=dense)
