"""Measures of the encoder for the comparison, read from its `summary.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.errors import DataError
from sidestack.infra.record import SUMMARY_FILE
from sidestack.infra.tables import read_json
from sidestack.pipelines.report.comparison import EncoderResult, SignalLoss


def read_encoder(path: Path, dataset: Path | None = None) -> EncoderResult:
    """Read the held-out measures in the `summary.json` of an encoder's output.

    Args:
        path: the output.
        dataset: the output of `materialize` with its SIDs, for the catalogue's numbers.

    Raises:
        DataError: the file is missing, or is not an encoder's.
    """
    file = Path(path) / SUMMARY_FILE
    values = read_json(file)
    try:
        holdout, digits = values["holdout"], values["holdout"]["digits"]
        return EncoderResult(
            items=holdout["items"],
            losses=tuple(_signal(name, measured) for name, measured in holdout["signals"].items()),
            unique_share=holdout["unique_share"],
            histogram=digits["histogram"],
            entropy_bits=digits["entropy_bits"],
            most_bits=digits["most_bits"],
            **_catalogue(dataset),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file}: not an encoder's summary: {type(error).__name__}: {error}") from error


def _catalogue(dataset: Path | None) -> dict[str, Any]:
    """Return the number of items with a SID of the default encoder, and of distinct SIDs."""
    if dataset is None or not (dataset / SUMMARY_FILE).exists():
        return {}
    summary = read_json(dataset / SUMMARY_FILE).get("sids", {}).get(DEFAULT_NAME)
    if summary is None:
        return {}
    return {"catalogue_items": summary["rows"] - summary["null"], "catalogue_unique_share": summary["unique_share"]}


def _signal(name: str, measured: Mapping[str, Any]) -> SignalLoss:
    top1 = measured.get("top1")
    return SignalLoss(name=name, kind="cosine" if top1 is None else "cross-entropy", loss=measured["loss"], top1=top1)
