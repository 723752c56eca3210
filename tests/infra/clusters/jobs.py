"""Render jobs by our schedulers, with a cluster's file or with options only."""

from pathlib import Path
from typing import Any

from torchx.specs import CfgVal

from sidestack.components import encoder
from sidestack.infra.schedulers import FACTORIES


def rendered(scheduler: str, options: dict[str, CfgVal] | None = None, **arguments: Any) -> Any:
    """Return the request that a scheduler would submit for an encoder's training."""
    app = encoder.train(config="/shared/c.yaml", dataset="/shared/d", out="/shared/o", **arguments)
    return FACTORIES[scheduler]("test").submit_dryrun(app, options or {}).request


def write_cluster(folder: Path, text: str) -> str:
    """Write a cluster's file and return its path."""
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)
