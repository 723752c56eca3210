"""Run the encoder's stage `export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestack.encoder.export import export
from sidestack.encoder.export_config import ExportConfig
from sidestack.infra.commit import committing
from sidestack.infra.config import parse
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from tests.encoder.fabricated import LOCAL


def export_encoder(encoder: Path, sids: Path, out: Path, changes: Mapping[str, Any] | None = None) -> None:
    """Run the body of stage `export` and commit its output."""
    config = parse(ExportConfig, changes or {}, "export")
    with committing(out, LOCAL, stage="export") as staging:
        log = RunLog.open(0, "export", staging, {}, {}, "", None)
        export(StageRun(config, {"encoder": encoder, "sids": sids}, staging, LOCAL, log))
