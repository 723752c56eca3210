"""The `baseline` section."""

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from sidestack.infra.config import Config, Seed
from sidestack.ranker.config import HoldoutConfig

ARM = "baseline"
"""The baseline's name in comparisons."""


class BaselineConfig(Config):
    """Gradient boosting, one classifier per task; scikit-learn's settings keep their names."""

    enabled: bool = True
    """Whether a pipeline trains the baseline and compares it with the arms."""
    max_train_rows: PositiveInt = 2_000_000
    """Approximate maximum of training rows; of more, a random sample is used and logged. A row takes about 30 bytes of
    memory per feature: 4 GB for this many rows with the 66 features of Complete Journey."""
    max_iter: PositiveInt = 300
    """The maximum of trees per task; early stopping may choose fewer."""
    learning_rate: PositiveFloat = 0.1
    max_leaf_nodes: int = Field(default=31, ge=2)
    min_samples_leaf: PositiveInt = 50
    max_features: float = Field(default=0.5, gt=0, le=1)
    """Share of the features that each split chooses from; drawn by the seed."""
    stopping_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of a task's training rows (the latest) on which the number of trees is chosen; the final fit uses all rows
    and that number."""
    n_iter_no_change: PositiveInt = 20
    """Early stopping: the number of trees without a better loss on the latest rows after which no more are tried."""
    seed: Seed = 0
    """Seeds samples and splits; replicate r of a pipeline uses this seed plus r."""
    holdout: HoldoutConfig = HoldoutConfig()
    """The dates to measure on. In a pipeline they are those of `ranker.holdout`."""

    @model_validator(mode="after")
    def _check_holdout(self) -> "BaselineConfig":
        if self.holdout.kind == "dates":
            raise ValueError(
                "holdout.kind=dates: is for rankers that are trained again and again; not for the baseline"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the output."""
        return self.model_dump(mode="json", exclude={"enabled"})
