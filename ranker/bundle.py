"""A trained ranker as its stage leaves it: what scores, exports and starts later trainings.

`model/ranker.json` holds the resolved configuration, the dataset's description, the SIDs' specs and the tables' rows;
beside it lie all weights and optimizer states (`infra.state`), for any number of ranks and any plan.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from encoder.sid import SidSpec
from infra.commit import read_manifest
from infra.config import VERSION, Config, parse, parse_written, plain
from infra.errors import DataError, SpecError
from infra.state import read_state, write_state
from infra.tables import DatasetSpec
from ranker.budget import DecidedConfig
from ranker.config import RankerConfig
from ranker.features import ArmFeatures, IdFeature, Sids, arm_features
from ranker.sharding import ShardedRanker

FOLDER = "model"
DESCRIPTION_FILE = "ranker.json"
STAGE = "ranker"


class Description(Config):
    """The content of `ranker.json`."""

    config: RankerConfig
    """Of one arm, resolved; what was left to a rule, decided."""
    spec: DatasetSpec
    """Of the dataset that it was trained on."""
    sids: dict[str, SidSpec]
    """The sets of SIDs that the arm takes."""
    rows: dict[str, PositiveInt]
    """Of every table, by name."""
    version: str = ""
    """The version of sidestack that wrote the file."""


@dataclass(frozen=True)
class RankerBundle:
    """A trained ranker on disk."""

    path: Path
    description: Description

    @property
    def config(self) -> DecidedConfig:
        """The configuration that it was trained with."""
        return parse(DecidedConfig, plain(self.description.config), str(self.path / DESCRIPTION_FILE))

    def features(self, spec: DatasetSpec) -> ArmFeatures:
        """Return what the arm reads and looks up of a dataset that may have grown since.

        Raises:
            SpecError, DataError, ConfigError: see `arm_features`.
        """
        return with_rows(arm_features(spec, self.description.config, self.description.sids), self.description.rows)

    def load(self, sharded: ShardedRanker, features: ArmFeatures) -> None:
        """Fill a model and its optimizers in place. Rows that tables have gained stay as they are initialized.

        Raises:
            DataError: a file cannot be read, or a tensor has another shape than in the model.
        """
        self.load_but(sharded, features, lambda name: False)

    def load_but(self, sharded: ShardedRanker, features: ArmFeatures, is_left: Callable[[str], bool]) -> None:
        """Do as `load`, and leave some tensors, by the names that `ShardedRanker.state` gives them, as they are.

        Raises:
            DataError: see `load`.
        """
        sharded.make_dense_state()
        whole, spread = sharded.parted_state(features)
        try:
            saved = read_state(self.path, {name: part for name, part in spread.items() if not is_left(name)})
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be loaded into this model: {error}") from error
        for name, tensor in whole.items():
            if not is_left(name):
                _fill(tensor, name, saved, self.path)


def with_rows(features: ArmFeatures, rows: Mapping[str, int]) -> ArmFeatures:
    """Return features whose SID tables have these rows, by table: a grown catalogue would ask for more."""

    def kept(tables: tuple[IdFeature, ...]) -> tuple[IdFeature, ...]:
        return tuple(replace(one, rows=rows.get(one.table, one.rows)) if one.is_sid else one for one in tables)

    return replace(features, bags=kept(features.bags), sequences=kept(features.sequences))


def save_bundle(
    out: Path, sharded: ShardedRanker, features: ArmFeatures, config: RankerConfig, spec: DatasetSpec, rank: int
) -> None:
    """Write a rank's part of a trained ranker into a stage's output.

    Args:
        out: the output. sharded: the model. features: what its arm reads. config: resolved and decided.
        spec: the dataset's. rank: this rank.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    whole, spread = sharded.parted_state(features)
    write_state(folder, whole, spread, rank)
    if rank == 0:
        rows = {table.table: table.rows for table in (*features.bags, *features.sequences)}
        values = RankerConfig.model_validate(config.model_dump())
        described = Description(config=values, spec=spec, sids=features.sids, rows=rows, version=VERSION)
        (folder / DESCRIPTION_FILE).write_text(described.model_dump_json(indent=1) + "\n", encoding="utf-8")


def open_bundle(path: Path) -> RankerBundle:
    """Open the output of a ranker's stage; its weights are read later.

    Raises:
        DataError: it is none. ConfigError: its description cannot be read by this version.
    """
    stage = read_manifest(path).stage
    if stage != STAGE:
        raise DataError(f"{path}: is an output of stage {stage!r}; a trained ranker is one of stage {STAGE!r}")
    return read_bundle(path / FOLDER)


def read_bundle(folder: Path) -> RankerBundle:
    """Read the description of a ranker in the folder that holds its weights.

    Raises:
        DataError: there is none. ConfigError: it cannot be read by this version.
    """
    file = folder / DESCRIPTION_FILE
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: holds no trained ranker: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    return RankerBundle(folder, parse_written(Description, values, str(file), version))


def require_sids(description: Description, sids: Sids, where: str) -> None:
    """Check that a dataset has the SIDs that a ranker was trained on.

    Raises:
        SpecError: a set is missing, or of another encoder.
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


def require_columns(description: Description, spec: DatasetSpec, where: str) -> None:
    """Check that a dataset has the columns and tasks that a ranker was trained on, in the same order.

    Raises:
        DataError: names all that differs.
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


def _fill(tensor: Tensor, name: str, saved: Mapping[str, Tensor], path: Path) -> None:
    found = saved.get(name)
    if found is None:
        raise DataError(f"{path}: {name} was not saved")
    if found.shape != tensor.shape:
        raise DataError(f"{path}: {name} was saved with shape {tuple(found.shape)}, now has {tuple(tensor.shape)}")
    tensor.copy_(found)
