"""The configuration of a served ranker beside its weights: the content of `served.json`."""

from pydantic import PositiveInt

from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.signals import Precision as StoredPrecision
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import Config
from sidestack.ranker.bundle_description import Description
from sidestack.ranker.serving.tables import Precision

MODEL_FOLDER = "model"
"""The MLflow model in the output of `ranker.export`."""
SERVED_FILE = "served.json"
NETWORK_FILE = "network.safetensors"
TABLES_FILE = "tables.safetensors"
CONSTANTS_FILE = "constants.safetensors"


class ServedSids(Config):
    """One set of Semantic IDs of a version: its map, and the encoder for items that the map does not have."""

    spec: SidSpec
    """The spec of the tables' SIDs."""
    revision: str = ""
    """The encoder's revision, see `encoder.bundle`; a refreshed encoder's SIDs of new items fit the tables."""
    rows: int
    """Number of items or users in the map."""
    signals: SignalSpec
    """The signals of a new item that the encoder needs."""
    stored: dict[str, StoredPrecision]
    """Precision in which the tables store each embedding, to which a request's numbers are rounded."""

    @property
    def map_file(self) -> str:
        """The map's file in the version's folder: int64 [rows, chunks]."""
        return f"sids/{self.spec.name}.int64"

    @property
    def encoder_folder(self) -> str:
        """The encoder's folder in the version's folder."""
        return f"encoders/{self.spec.name}"


class ServedConfig(Config):
    """The configuration of a served version."""

    ranker: Description
    tables: Precision
    """The precision of the stored embedding tables."""
    sids: dict[str, ServedSids]
    """The sets that the arm takes, by name."""
    scales: dict[str, float] = {}
    """For content with embeddings: by signal of items, the scale of a new item's embedding
    (`ranker.constants.ModelConstants.scales`)."""
    max_candidates: PositiveInt
    """The most candidates of a request."""
    max_history: PositiveInt
    """The most history entries of a request."""
    lineage: dict[str, str]
    """Digests of the version's inputs, by name."""
    files: dict[str, str]
    """SHA-256 of each file beside this one, by its path."""
