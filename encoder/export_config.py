"""Section `export`: limits of the served model, and the name that it is registered under."""

from pydantic import Field, PositiveInt

from sidestack.infra.config import Config


class ExportConfig(Config):
    """Section `export`."""

    registered_model: str | None = Field(default="sidestack-encoder", pattern=r"^[\w .-]+$")
    """Name in the registry of `MLFLOW_TRACKING_URI`. Without that variable, or with null, nothing is registered."""
    alias: str = Field(default="champion", pattern=r"^[A-Za-z][\w-]*$")
    """Alias that is moved to the new version, so that `models:/<registered_model>@<alias>` is this model."""
    max_items: PositiveInt = 1024
    """The most items a request may hold."""
    checked_items: PositiveInt = 512
    """Number of items whose SIDs in the tables the saved model must reproduce before it is committed."""
