"""The `compare` section. It stands apart so that the driver can read it without what draws the report."""

from typing import Any

from pydantic import Field

from sidestack.infra.config import Config, Seed
from sidestack.ranker.metric_registry import OWN, all_metrics


class VerdictConfig(Config):
    """What a verdict asks of a training and of the rows it is measured on; where they fall short it is withheld."""

    min_positives: int = Field(default=100, ge=0)
    """Held-out rows that a task, or a segment, must have with label 1, and with label 0."""
    min_users: int = Field(default=100, ge=0)
    """Users that a task, or a segment, must have among its labelled held-out rows, and a metric among those that it
    stands on: of GAUC the users with both labels."""
    min_learned: float = Field(default=0.005, ge=0.0)
    """How far NE must lie below 1, that of always predicting the base rate: over the last quarter of the training and
    on the held-out rows, of the arm and of the one it is compared with."""
    max_late_fall: float = Field(default=0.05, gt=0.0)
    """The share by which NE may still fall at the end: training NE from the third quarter of the training to the last,
    or validation NE from one point to the next, where it has two points. What falls further has not converged, and the
    gain is of how long the arms were trained. Of training NE, a fall within twice its standard error, as the points of
    the curve scatter, is none."""
    max_validation_rise: float = Field(default=0.01, gt=0.0)
    """The share by which validation NE may lie above its lowest at the end of the training: what rises further
    overfits."""
    min_feature_bytes: float = Field(default=2.0, ge=0.0)
    """Bytes of content feature a row that a return (RoI) may be divided by."""


class CompareConfig(Config):
    """How the arms are compared."""

    reference: str = "none"
    """The arm that NE gains are over."""
    resamples: int = Field(default=1000, ge=100)
    """Resamples of users and trainings."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Share of the resamples inside an interval."""
    seed: Seed = 0
    """Seed of the resamples."""
    verdict: VerdictConfig = VerdictConfig()
    """When a gain is judged, and when its verdict is withheld."""

    def identity(self) -> dict[str, Any]:
        """Return the settings, and the metrics that other packages add: with another one arms are compared again."""
        values = super().identity()
        foreign = [name for name in all_metrics() if name not in OWN]
        return {**values, "foreign_metrics": foreign} if foreign else values
