"""Warm start of a training from an earlier ranker: its weights, its tables and its optimizers' states.

Rows of new ids get the initial weights that they would have had from the start (`ranker.initial`). In tables with
admission, so do rows reassigned to another id. The moments of the dense features stay the earlier ranker's, as its
weights were trained with them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidestack.infra.errors import ConfigError, SpecError
from sidestack.infra.tables import DatasetSpec
from sidestack.infra.tracking import RunLog
from sidestack.ranker.admission import reassigned_rows
from sidestack.ranker.bundle import RankerBundle, open_bundle
from sidestack.ranker.bundle_description import require_sids, require_trained_columns, with_rows
from sidestack.ranker.config import ModelConfig, RankerConfig
from sidestack.ranker.contents.contract import Position
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.row_maps import read_row_maps
from sidestack.ranker.sharding import ShardedRanker, table_of

SID_WEIGHTS = ("latent.", "omega", "projection.weight", "layers.0.weight", "layers.0.bias")
"""Name prefixes of the first weights after a SID: a kind's own, Omega and a projection (history), a perceptron's first
layer (ad, user)."""
_CONTENT: Mapping[Position, str] = {
    "item": "body.content.",
    "user": "body.user_content.",
    "history": "body.history.content.",
}


@dataclass(frozen=True)
class WarmStart:
    """The earlier ranker of a training, and which of its weights to load.

    Attributes:
        bundle: the earlier ranker. sids_anew: whether the weights of SIDs keep their initial values.
        tables_anew: whether all tables keep theirs.
    """

    bundle: RankerBundle
    sids_anew: bool
    tables_anew: bool = False

    def features(self, features: ArmFeatures) -> ArmFeatures:
        """Return the arm's features, with SID tables of the earlier ranker's size unless they start anew."""
        return features if self.sids_anew else with_rows(features, self.bundle.description.rows)

    def load(self, sharded: ShardedRanker, features: ArmFeatures) -> None:
        """Load into a newly initialized model; rows reassigned to another id keep their initial values.

        Raises:
            DataError: a file cannot be read, or a tensor has another shape than in the model.
        """
        self.bundle.load_except(sharded, features, self._is_left(features), self._reassigned(features))

    def load_tables(self, sharded: ShardedRanker, features: ArmFeatures) -> None:
        """Load only the tables and their optimizers' states, into newly initialized tables.

        Raises:
            DataError: see `load`.
        """
        self.bundle.load_tables(sharded, features, self._is_left(features), self._reassigned(features))

    def _is_left(self, features: ArmFeatures) -> Callable[[str], bool]:
        def is_left(name: str) -> bool:
            is_tables = self.tables_anew and table_of(name) is not None
            return is_tables or (self.sids_anew and _belongs_to_sids(name, features))

        return is_left

    def _reassigned(self, features: ArmFeatures) -> dict[str, Tensor]:
        """Return the rows that now belong to another id, by table."""
        tables = [one for one in features.tables if one.has_admission]
        before = read_row_maps(self.bundle.path, [one.column for one in tables])
        found = {}
        for one in tables:
            assert one.row_map is not None
            rows = reassigned_rows(before[one.column], one.row_map, one.rows, one.fallback_rows)
            found[one.table] = torch.from_numpy(rows)
        return found

    def log(self, log: RunLog, features: ArmFeatures) -> None:
        """Log what the training starts from."""
        what = (
            "weights of the network and their optimizer's states"
            if self.tables_anew
            else "weights, tables, optimizer states"
        )
        log.info(f"starts from {self.bundle.path.parent}: {what}")
        if self.sids_anew:
            tables = [table.table for table in features.tables if table.is_sid]
            named = ", ".join([*tables, "the layers that meet SIDs first"])
            log.info(f"its SIDs are another encoder's (ranker.training.start_sids=anew): anew start {named}")


def open_start(path: Path, config: RankerConfig, spec: DatasetSpec, features: ArmFeatures) -> WarmStart:
    """Open the ranker that a training starts from, and check that it fits the training.

    Args:
        path: the output of its stage. config: the arm's, resolved. spec: the dataset's. features: what the arm reads.

    Raises:
        ConfigError: it has another arm or other sizes. DataError: its dataset had other columns or tasks.
        SpecError: its SIDs are another encoder's, and `ranker.training.start_sids` is `same`.
    """
    bundle = open_bundle(path)
    described, where = bundle.description, f"start={path}"
    was, now = described.config, config
    if was.content.model_copy(update={"overlay": {}}) != now.content.model_copy(update={"overlay": {}}):
        raise ConfigError(f"{where}: is arm {was.arm!r}, whose content differs from that of {now.arm!r}")
    sizes, now_sizes = (one.model.model_dump(exclude={"table_rows", "admission"}) for one in (was, now))
    differs = [name for name, value in sizes.items() if value != now_sizes[name]]
    if differs:
        raise ConfigError(f"{where}: ranker.model.{', ranker.model.'.join(differs)}: are not those it was trained with")
    if faults := list(_admission_faults(was.model, now.model)):
        raise ConfigError(f"{where}: ranker.model.admission: {'; '.join(faults)}")
    require_trained_columns(described, spec, where)
    tables_anew = config.training.start_tables == "anew"
    try:
        require_sids(described, features.sids, where)
    except SpecError as error:
        if config.training.start_sids == "same":
            raise SpecError(f"{error}; ranker.training.start_sids=anew starts what belongs to SIDs anew") from error
        return WarmStart(bundle, True, tables_anew)
    return WarmStart(bundle, False, tables_anew)


def _admission_faults(was: ModelConfig, now: ModelConfig) -> Iterator[str]:
    """Yield messages for settings that would move ids to other rows; counts and ages may differ."""
    for column in sorted(was.admission.keys() ^ now.admission.keys()):
        had, has = ("has", "has none") if column in was.admission else ("has no", "has")
        yield f"{column}: the earlier ranker {had} admission, this one {has}"
    for column in sorted(was.admission.keys() & now.admission.keys()):
        old, new = was.admission[column], now.admission[column]
        if old.fallback_rows != new.fallback_rows:
            yield f"{column}.fallback_rows={new.fallback_rows}: must be {old.fallback_rows}, as in the earlier ranker"
        if old.max_rows > new.max_rows:
            yield f"{column}.max_rows={new.max_rows}: must be {old.max_rows} at least, as in the earlier ranker"


def _belongs_to_sids(name: str, features: ArmFeatures) -> bool:
    """Return whether a tensor belongs to SIDs, from its name in `ShardedRanker.state`."""
    table = table_of(name)
    if table is not None:
        return any(table == one.table for one in features.tables if one.is_sid)
    own = name.partition(".")[2]  # after "model" or "optimizer"
    begins = [_CONTENT[content.position] for content in features.contents if content.sids]
    return own.startswith(tuple(f"{prefix}{weight}" for prefix in begins for weight in SID_WEIGHTS))
