"""Section `export`: how the served model is bounded, and under what name it is registered."""

from pydantic import Field, PositiveInt

from sidestack.infra.config import Config


class ExportConfig(Config):
    """Section `export`."""

    registered_model: str | None = Field(default="sidestack-encoder", pattern=r"^[\w .-]+$")
    """Name in the registry of `MLFLOW_TRACKING_URI`. Without that variable, or with null, nothing is registered."""
    alias: str = Field(default="champion", pattern=r"^[A-Za-z][\w-]*$")
    """Alias that is moved to the new version: `models:/<registered_model>@<alias>` is then this model."""
    max_items: PositiveInt = 1024
    """The most items a request may hold."""
    checked_items: PositiveInt = 512
    """Items of the tables that the saved model must give the tables' own SIDs before it is committed."""
