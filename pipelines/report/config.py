"""The `compare` section, in a module of its own so that the driver need not import the report's drawing code."""

from typing import Any

from pydantic import Field

from sidestack.infra.config import Config, Seed
from sidestack.ranker.metric_registry import OWN, all_metrics


class VerdictConfig(Config):
    """Requirements of a verdict on training and held-out rows; if one is not met, the verdict is withheld."""

    min_positives: int = Field(default=100, ge=0)
    """Minimum number of held-out rows of a task or segment with label 1, and with label 0."""
    min_users: int = Field(default=100, ge=0)
    """Minimum number of users in the labelled held-out rows of a task or segment, and of users that a metric is based
    on: for GAUC, users with both labels."""
    min_learned: float = Field(default=0.005, ge=0.0)
    """Minimum distance of NE below 1 (the NE of predicting the base rate), over the last quarter of the training and on
    the held-out rows, for the arm and the one it is compared with."""
    max_late_fall: float = Field(default=0.05, gt=0.0)
    """Maximum relative fall of NE at the end: of validation NE from one point to the next if it has two points, else of
    training NE from the third quarter of the training to the last. With a larger fall the training has not converged,
    and the gain depends on how long the arms were trained. A fall of training NE within twice its standard error (from
    the scatter of the curve's points) does not count."""
    max_validation_rise: float = Field(default=0.01, gt=0.0)
    """Maximum relative rise of validation NE at the end of the training above its minimum; more is overfitting."""
    min_feature_bytes: float = Field(default=2.0, ge=0.0)
    """Minimum bytes of content feature per row for a return (RoI)."""


class CompareConfig(Config):
    """Settings of the comparison."""

    reference: str = "none"
    """The arm over which NE gains are computed."""
    resamples: int = Field(default=1000, ge=100)
    """Number of resamples of users and trainings."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Share of the resamples inside an interval."""
    seed: Seed = 0
    """Seed of the resamples."""
    verdict: VerdictConfig = VerdictConfig()
    """When verdicts are withheld."""

    def identity(self) -> dict[str, Any]:
        """Return the settings, and the metrics of other packages: a new metric makes the comparison run again."""
        values = super().identity()
        foreign = [name for name in all_metrics() if name not in OWN]
        return {**values, "foreign_metrics": foreign} if foreign else values
