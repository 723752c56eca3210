"""The `compare` section. It stands apart so that the driver can read it without what draws the report."""

from pydantic import Field

from infra.config import Config


class CompareConfig(Config):
    """How the arms are compared."""

    reference: str = "none"
    """The arm that NE gains are over."""
    resamples: int = Field(default=1000, ge=100)
    """Resamples of users and trainings."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Share of the resamples inside an interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples."""
