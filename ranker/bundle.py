"""A trained ranker as its stage saves it, for scoring, export and warm start.

`model/ranker.json` holds the resolved configuration, the dataset's description, the SIDs' specs and the tables' rows.
Beside it are all weights and optimizer states (`infra.state`), for any number of ranks and any plan, and, if tables
have admission, the rows of ids (`ranker.row_maps`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from sidestack.infra.config import VERSION, parse_written
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import read_manifest
from sidestack.infra.shards import Shard, Spread
from sidestack.infra.state import fill, read_state, write_state
from sidestack.infra.tables import DatasetSpec, read_json
from sidestack.ranker.budget import DecidedConfig
from sidestack.ranker.bundle_description import Description
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.row_maps import with_row_maps
from sidestack.ranker.sharding import ShardedRanker

FOLDER = "model"
DESCRIPTION_FILE = "ranker.json"
STAGE = "ranker"
_BODY = "model.body."


@dataclass(frozen=True)
class RankerBundle:
    """A trained ranker on disk."""

    path: Path
    description: Description

    def features(self, spec: DatasetSpec | None = None) -> ArmFeatures:
        """Return the arm's features, with the row maps of its tables; see `Description.features`.

        Raises:
            DataError: the maps cannot be read. SpecError, ConfigError: see `Description.features`.
        """
        return with_row_maps(self.description.features(spec), self.path)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the network's weights by name, and the tables' by table, whole, without the optimizers' states.

        Raises:
            DataError: a file cannot be read.
        """
        features, dim = self.description.features(), self.description.config.model.embedding_dim
        whole = {_weight_name(one, features): torch.empty(one.rows, dim) for one in features.tables}
        shards = {name: Spread(tuple(rows_ND.shape), [Shard((0, 0), rows_ND)]) for name, rows_ND in whole.items()}
        try:
            shared = read_state(self.path, shards)
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        network = {name.removeprefix(_BODY): tensor for name, tensor in shared.items() if name.startswith(_BODY)}
        return network, {one.table: whole[_weight_name(one, features)] for one in features.tables}

    def load(self, sharded: ShardedRanker, features: ArmFeatures) -> None:
        """Load weights and optimizer states into a model in place. Rows new to its tables keep their initial values.

        Raises:
            DataError: a file cannot be read, or a tensor has another shape than in the model.
        """
        self.load_except(sharded, features, lambda name: False, {})

    def load_except(
        self,
        sharded: ShardedRanker,
        features: ArmFeatures,
        is_left: Callable[[str], bool],
        rows_left: Mapping[str, Tensor],
    ) -> None:
        """Load like `load`, but leave some tensors and some rows of tables as they are.

        Args:
            sharded, features: see `load`. is_left: whether to leave a tensor, by its name in `ShardedRanker.state`.
            rows_left: rows to leave, by table, with their optimizer states.

        Raises:
            DataError: see `load`.
        """
        sharded.make_dense_state()
        saved = self.load_tables(sharded, features, is_left, rows_left)
        whole, _ = sharded.parted_state(features)
        try:
            fill({name: tensor for name, tensor in whole.items() if not is_left(name)}, saved)
        except ValueError as error:
            raise self._mismatch(error) from error

    def load_tables(
        self,
        sharded: ShardedRanker,
        features: ArmFeatures,
        is_left: Callable[[str], bool],
        rows_left: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Load only the tables and their states, except what is left, and return the saved network's tensors.

        Args:
            sharded, features, is_left, rows_left: see `load_except`.

        Raises:
            DataError: see `load`.
        """
        left = list(sharded.held_rows(features, rows_left))
        _, spread = sharded.parted_state(features)
        try:
            saved = read_state(self.path, {name: part for name, part in spread.items() if not is_left(name)})
        except (OSError, SafetensorError, ValueError) as error:
            raise self._mismatch(error) from error
        for part, places, values in left:
            part[places] = values
        return saved

    def _mismatch(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: cannot be loaded into this model: {error}")


def save_bundle(
    out: Path, sharded: ShardedRanker, features: ArmFeatures, config: DecidedConfig, spec: DatasetSpec, rank: int
) -> None:
    """Write a rank's part of a trained ranker into a stage's output.

    Args:
        out: the output folder. sharded: the model. features: what its arm reads. config: resolved.
        spec: the dataset's. rank: this rank.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    whole, spread = sharded.parted_state(features)
    write_state(folder, whole, spread, rank)
    if rank == 0:
        described = describe(features, config, spec)
        (folder / DESCRIPTION_FILE).write_text(described.model_dump_json(indent=1) + "\n", encoding="utf-8")


def describe(features: ArmFeatures, config: DecidedConfig, spec: DatasetSpec) -> Description:
    """Return a ranker's description; see `save_bundle` for the arguments."""
    rows = {table.table: table.rows for table in features.tables}
    return Description(config=config, spec=spec, sids=features.sids, rows=rows, version=VERSION)


def open_bundle(path: Path) -> RankerBundle:
    """Open the output of a ranker's stage; its weights are read later.

    Raises:
        DataError: it is no ranker's output. ConfigError: this version cannot read its description.
    """
    stage = read_manifest(path).stage
    if stage != STAGE:
        raise DataError(f"{path}: is an output of stage {stage!r}; a trained ranker is one of stage {STAGE!r}")
    return read_bundle(path / FOLDER)


def read_bundle(folder: Path) -> RankerBundle:
    """Read the description of a ranker in the folder that holds its weights.

    Raises:
        DataError: there is none. ConfigError: this version cannot read it.
    """
    file = folder / DESCRIPTION_FILE
    try:
        values = read_json(file)
    except DataError as error:
        raise DataError(f"{folder}: holds no trained ranker: {error}") from error
    return RankerBundle(folder, parse_written(Description, values, str(file), values.get("version")))


def _weight_name(table: IdFeature, features: ArmFeatures) -> str:
    """Return the name that a table's weights have in `ShardedRanker.state`."""
    if table in features.sequences:
        return f"model.sequences.embeddings.{table.table}.weight"
    return f"model.{'request_' if table.of_request else ''}bags.embedding_bags.{table.table}.weight"
