"""Section `ranker_export`: how a served ranker is stored, bounded and registered."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from sidestack.infra.config import Config


class RankerExportConfig(Config):
    """Section `ranker_export`."""

    tables: Literal["float32", "float16", "int8"] = "float32"
    """Precision of the stored embedding tables. Below float32, the loss in quality is measured on held-out rows."""
    max_ne_loss: NonNegativeFloat = 0.001
    """Below float32: how much any task's normalized entropy may rise, as a share of the ranker's own."""
    tolerance: PositiveFloat = 1e-5
    """With float32 tables: how far a probability may be from the ranker's own."""
    checked_rows: PositiveInt = 512
    """Minimum number of held-out rows on which the saved model is compared with the ranker's own predictions before the
    commit; below float32, 40 times as many, so that normalized entropy is meaningful."""
    max_candidates: PositiveInt = 1000
    """The most candidates of a request."""
    max_history: PositiveInt = 10_000
    """The most history entries of a request."""
    registered_model: str | None = Field(default="sidestack-ranker", pattern=r"^[\w .-]+$")
    """Name in the registry of `MLFLOW_TRACKING_URI`. Without that variable, or with null, nothing is registered."""
    alias: str = Field(default="challenger", pattern=r"^[A-Za-z][\w-]*$")
    """Alias that is moved to the new version: `models:/<registered_model>@<alias>` is then this model."""
