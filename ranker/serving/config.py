"""What a served ranker is told beside its weights: the content of `served.json`."""

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
    """Of the tables."""
    revision: str = ""
    """Of the encoder, see `encoder.bundle`; a refreshed one gives SIDs of the tables' generation to new items."""
    rows: int
    """Items or users that the map holds."""
    signals: SignalSpec
    """What the encoder takes of a new item."""
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
    """How a version is served."""

    ranker: Description
    tables: Precision
    """In which the embedding tables are kept."""
    sids: dict[str, ServedSids]
    """By name: the sets that the arm takes."""
    scales: dict[str, float] = {}
    """Of content with embeddings: by signal of items, what a new item's numbers are multiplied by
    (`ranker.constants.ModelConstants.scales`)."""
    max_candidates: PositiveInt
    """The most candidates of a request."""
    max_history: PositiveInt
    """The most history entries of a request."""
    lineage: dict[str, str]
    """Digests of what the version was made of, by name."""
    files: dict[str, str]
    """SHA-256 of each file beside this one, by its path."""
