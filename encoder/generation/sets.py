"""The sets of SIDs that a run makes: the encoder of each, and its entry in the snapshot."""

from dataclasses import dataclass, field
from pathlib import Path

from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.config import MaterializeConfig
from sidestack.encoder.published import Published, Reusable, find_published, reusable_columns
from sidestack.encoder.sid.columns import event_columns, sid_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import SidMaps, sid_maps
from sidestack.infra.code import code_digest, foreign_code
from sidestack.infra.config import digest, parse, plain
from sidestack.infra.kinds import models_in
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import CONTENT, Dataset, SidSet
from sidestack.infra.stage import StageRun
from sidestack.infra.store import Store

CODE = (
    "encoder/bundle.py", "encoder/encoding.py", "encoder/fusion.py", "encoder/generation", "encoder/quantizers",
    "encoder/search.py", "encoder/sid", "encoder/sid_map.py", "encoder/signals.py", "infra/take.py",
    "infra/parquet.py", "infra/parquet_writer.py",
)  # fmt: skip
"""The code that, besides rows and encoder, decides the bytes of a partition of SIDs."""


@dataclass(frozen=True)
class SidSetWork:
    """One encoder, and the set of SIDs that it makes for the items, or for the users.

    Attributes:
        bundle: the encoder. spec: the spec of the SIDs. listed: the set's entry in the snapshot to write.
        code: digest of the code that decides its partitions.
        published: the same generation's SIDs as an earlier snapshot lists them. reusable: the partitions taken over.
        parts: the partitions of the items' (users') SIDs, once they are made.
    """

    bundle: EncoderBundle
    spec: SidSpec
    listed: SidSet
    code: str
    published: Published | None
    reusable: Reusable
    parts: list[PartitionEntry] = field(default_factory=list)

    def table(self, base: str) -> str:
        """Return the name of the table of its columns that is row-aligned with a base table."""
        return self.listed.table(self.spec.name, base)

    @property
    def content(self) -> str:
        """The table whose rows are encoded."""
        return CONTENT[self.spec.entity]

    def maps(self, store: Store) -> SidMaps:
        """Return the map from id to SID over all parts made so far."""
        return sid_maps(store.path, self.parts, len(self.spec.chunk_sizes))


@dataclass(frozen=True)
class MaterializeWork:
    """The state that all parts of the stage share."""

    dataset: Dataset
    store: Store
    sets: tuple[SidSetWork, ...]
    batch_size: int


def open_sid_set(
    run: StageRun[MaterializeConfig], dataset: Dataset, earlier: Dataset | None, name: str, encoder: Path
) -> SidSetWork:
    """Open an encoder and the published SIDs of its generation.

    Args:
        run: the stage's. dataset: the rows to encode. earlier: the snapshot with published SIDs. name: the SIDs' name.
        encoder: the output of the encoder's stage.

    Raises:
        ConfigError, DataError, SpecError: a prefix does not fit, the encoder cannot be read or does not match the
            dataset, or published SIDs cannot be kept.
    """
    bundle = load_bundle(encoder, run.world.device)
    bundle.signals.require(dataset.spec, dataset.path)
    lengths = run.config.prefix_lengths.get(name, ())
    chosen = {"name": name, "prefix_lengths": lengths, "packing": run.config.packing}
    spec = parse(SidSpec, {**bundle.spec.model_dump(), **chosen}, f"materialize (SIDs {name!r})")
    code = digest({"ours": code_digest(CODE), **foreign_code(models_in(bundle.config))})
    published = find_published(earlier, spec)
    if published is None or run.config.published == "move":
        return SidSetWork(bundle, spec, listed_set(spec, bundle.revision), code, published, {})
    return SidSetWork(bundle, spec, published.listed, code, published, reusable_columns(published, spec, dataset))


def listed_set(spec: SidSpec, revision: str = "") -> SidSet:
    """Return a snapshot's entry for a set of SIDs.

    Args:
        spec: the whole SID's spec.
        revision: the revision of the encoder that makes the first SIDs; empty: it began the generation.
    """
    columns = {CONTENT[spec.entity]: tuple(sid_columns(spec.name, spec))}
    for base in ("events", "requests"):
        names = tuple(name for name, held in event_columns(spec).items() if table_of(name, held) == base)
        if names:
            columns[base] = names
    refreshed = f"-{revision[:12]}" if revision not in ("", spec.fingerprint) else ""
    return SidSet(generation=f"{digest(plain(spec))[:12]}{refreshed}", spec=plain(spec), columns=columns)


def table_of(column: str, spec: SidSpec) -> str:
    """Return the table that an event's SID column is row-aligned with: `requests` for users and histories."""
    is_request_s = spec.entity == "user" or column.startswith(spec.event_history_base)
    return "requests" if is_request_s else "events"
