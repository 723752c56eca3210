"""The description of a trained ranker, and checks that a dataset fits it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import PositiveInt

from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.config import Config
from sidestack.infra.errors import DataError, SpecError
from sidestack.infra.tables import DatasetSpec
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.contents.contract import Sids
from sidestack.ranker.features import ArmFeatures, arm_features
from sidestack.ranker.id_feature import IdFeature


class Description(Config):
    """The content of `ranker.json`."""

    config: DecidedConfig
    """The configuration of one arm, resolved."""
    spec: DatasetSpec
    """The spec of the dataset that it was trained on."""
    sids: dict[str, SidSpec]
    """The sets of SIDs that the arm takes."""
    rows: dict[str, PositiveInt]
    """The number of rows of every table, by name."""
    version: str = ""
    """The version of sidestack that wrote the file."""

    def features(self, spec: DatasetSpec | None = None) -> ArmFeatures:
        """Return the arm's features over a dataset that may have grown since; by default over its own.

        Raises:
            SpecError, DataError, ConfigError: see `arm_features`.
        """
        return with_rows(arm_features(spec or self.spec, self.config, self.sids), self.rows)


def with_rows(features: ArmFeatures, rows: Mapping[str, int]) -> ArmFeatures:
    """Return features whose SID tables have these rows, by table; by rule, a grown catalogue would need more."""

    def kept(one: IdFeature) -> IdFeature:
        return replace(one, rows=rows.get(one.table, one.rows)) if one.is_sid else one

    return features.with_tables(kept)


def require_sids(description: Description, sids: Sids, where: str) -> None:
    """Check that a dataset has the SIDs that a ranker was trained on.

    Raises:
        SpecError: a set is missing, or from another encoder.
    """
    for name, wanted in description.sids.items():
        found = sids.get(name)
        if found is None:
            raise SpecError(f"{where}: has no SIDs {name!r}, which the ranker takes")
        if found.fingerprint != wanted.fingerprint:
            raise SpecError(
                f"{where}: SIDs {name!r} have fingerprint {found.fingerprint[:16]}…, the ranker was trained on"
                f" {wanted.fingerprint[:16]}…: they are another encoder's"
            )


def require_trained_columns(description: Description, spec: DatasetSpec, where: str) -> None:
    """Check that a dataset has the columns and tasks that a ranker was trained on, in the same order.

    Raises:
        DataError: names all differences.
    """
    differs = [
        f"{name}: the ranker has {', '.join(wanted) or 'none'}, the dataset {', '.join(found) or 'none'}"
        for name in ("tasks", "dense", "sparse")
        if (wanted := _names(description.spec, name)) != (found := _names(spec, name))
    ]
    if differs:
        raise DataError(f"{where}: columns or tasks do not fit: {'; '.join(differs)}")


def _names(spec: DatasetSpec, what: str) -> tuple[str, ...]:
    found: Any = {"tasks": spec.tasks, "dense": spec.all_dense, "sparse": spec.all_sparse}[what]
    return tuple(found)
