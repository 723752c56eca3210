"""The `tables` section: the papers' tables, by the arms that each holds against each other."""

from typing import Literal

from pydantic import model_validator

from infra.config import Config


class PaperFigures(Config):
    """What a paper's table has of one arm."""

    cost: float | None = None
    """Incremental cost, over that of the table's first arm."""
    click: float | None = None
    """Click NE gain in per cent."""
    conversion: float | None = None
    """Conversion NE gain in per cent."""
    roi: float | None = None
    """Return on investment, over that of the table's first arm."""
    auc: float | None = None
    """AUC gain in per cent."""
    storage: float | None = None
    """How many times smaller it is stored than the embedding it quantizes."""


class TableConfig(Config):
    """One table of a paper: the arms that are held against each other."""

    title: str
    arms: tuple[str, ...]
    """Of `ranker.arms`, the reference among them."""
    reference: str = "none"
    """The arm that gains are over."""
    metric: Literal["ne", "auc"] = "ne"
    """What gains are shown in: normalized entropy, as in the SIDE paper, or AUC, as in the second."""
    storage_over: dict[str, str] = {}
    """By arm: the dense arm whose embeddings it quantizes; shows how many times smaller it is, and how much of the
    dense arm's gain it keeps."""
    differs: str
    """How our setting differs from the paper's."""
    paper: dict[str, PaperFigures] = {}
    """By arm: the paper's figures."""

    @model_validator(mode="after")
    def _check_arms(self) -> "TableConfig":
        for name in (self.reference, *self.paper, *self.storage_over, *self.storage_over.values()):
            if name not in self.arms:
                raise ValueError(f"{name!r} must be one of the table's arms, {', '.join(self.arms)}")
        return self
