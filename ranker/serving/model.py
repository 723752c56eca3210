"""A served ranker: requests in, probabilities out. It keeps no state between requests, so threads may share it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sidestack.encoder.bundle import load_bundle
from sidestack.encoder.encoding import one_thread
from sidestack.encoder.serving import ServedConfig as ServedEncoderConfig
from sidestack.encoder.serving import ServedEncoder, served_batch
from sidestack.encoder.sid.columns import position_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import SignalSpec
from sidestack.infra.config import parse_written
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.files import hash_all
from sidestack.infra.rows import Rows
from sidestack.infra.sealed import unseal
from sidestack.ranker.body import Body
from sidestack.ranker.bundle_description import require_sids
from sidestack.ranker.constants import ModelConstants
from sidestack.ranker.content import NewItems
from sidestack.ranker.contents.contract import Content
from sidestack.ranker.features import HISTORY_IDS, ITEM_IDS, USER_IDS, ArmFeatures
from sidestack.ranker.row_maps import with_row_maps
from sidestack.ranker.serving.config import (
    CONSTANTS_FILE,
    NETWORK_FILE,
    SERVED_FILE,
    TABLES_FILE,
    ServedConfig,
    ServedSids,
)
from sidestack.ranker.serving.network import LocalNetwork
from sidestack.ranker.serving.parse import UNKNOWN, Parsed, RequestParser, Values
from sidestack.ranker.serving.tables import ServedTable

Integers = npt.NDArray[np.int64]
ServedScores = dict[str, Any]

CODEBOOK, EMBEDDINGS = "codebook", "embeddings"
"""Names of constants in their file: `codebook.NAME` of SIDs, `embeddings.ENTITY`."""


@dataclass(frozen=True)
class SidLookup:
    """The source of a request's SIDs of one set: the version's map, or its encoder for an item with signals."""

    config: ServedSids
    ids_IC: Integers
    encoder: ServedEncoder

    def of(self, ids_N: Integers) -> Integers:
        """Return the published SIDs of ids, int64 [N, chunks]; `NULL` where there is none."""
        known_N = (ids_N >= 0) & (ids_N < len(self.ids_IC))
        sids_NC = np.array(self.ids_IC[np.where(known_N, ids_N, 0)])
        sids_NC[~known_N] = NULL
        return sids_NC

    def encoded(self, signals: Sequence[Values], places: Sequence[str]) -> Integers:
        """Return the SIDs of new items from their signals, likewise.

        Raises:
            DataError: a signal breaks its rule; names the candidate.
        """
        own = [{name: value for name, value in one.items() if name in self.config.signals.names} for one in signals]
        return self.encoder.ids(own, places)


@dataclass(frozen=True)
class RawLookup:
    """The conversion of an item's signals to the format of the constant of raw embeddings.

    Attributes:
        dims: dimensions by signal, in order of concatenation.
        scales: likewise, see `ModelConstants.scales`.
        known_I: whether the constant has embeddings of an item; the last row is for unknown items.
    """

    dims: Mapping[str, int]
    scales: Mapping[str, float]
    known_I: Tensor

    def embeddings(self, signals: Sequence[Values], places: Sequence[str]) -> Tensor:
        """Return float16 [N, width], rounded and scaled as the constant's; zeros where a signal is missing.

        Raises:
            DataError: a signal breaks its rule; names the candidate.
        """
        spec = SignalSpec(embeddings=dict(self.dims), categoricals={}, weights=dict.fromkeys(self.dims, 1.0))
        own = [{name: value for name, value in one.items() if name in self.dims} for one in signals]
        batch = served_batch(own, spec, dict.fromkeys(self.dims, "float16"), places)
        parts = []
        for name, scale in self.scales.items():
            with np.errstate(over="ignore"):  # raised below
                x_ND = batch.embeddings[name].numpy().astype(np.float16) * np.float16(scale)
            wrong = np.argwhere(~np.isfinite(x_ND))
            if len(wrong):
                row, at = wrong[0].tolist()
                raise DataError(f"{places[row]}.{name}[{at}]: is beyond float16 when it is scaled by {scale:g}")
            parts.append(torch.from_numpy(x_ND))
        return torch.cat(parts, dim=1)


class ServedRanker:
    """A loaded version.

    Args of the constructor:
        folder: the version's folder, from `ranker.export`.

    Raises:
        DataError: a file is missing or altered. SpecError: encoder, SIDs and ranker do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        described = self.config.ranker
        self.features: ArmFeatures = with_row_maps(described.features(), folder)
        constants = _constants(folder)
        self._raw = _raw_lookup(self.features.item, self.config.scales, constants)
        signals = {name for one in self.config.sids.values() for name in one.signals.names}
        if self._raw is not None:
            signals |= {*self._raw.scales}
        bounds = self.config.max_candidates, self.config.max_history
        self._parser = RequestParser(described.spec, signals, *bounds)
        require_sids(described, {name: one.spec for name, one in self.config.sids.items()}, str(folder))
        self._sids = {name: _sid_lookup(folder, one) for name, one in self.config.sids.items()}
        body = Body(self.features, described.config, constants)
        _load_network(body, folder)
        self._network = LocalNetwork(self.features, body, _tables(folder))

    def answer(self, request: object, where: str) -> ServedScores:
        """Score the candidates of one request.

        Returns:
            `probabilities`: by task, in the candidates' order, given that the task's ancestors happened.
            `unknown`: the number of unknown ids, by kind; empty if all are known.

        Raises:
            DataError: names field and rule.
        """
        parsed = self._parser.parse(request, where).newest(self.config.ranker.config.model.history.max_length)
        sids = {name: self._sids_of(name, parsed, where) for name in self._sids}
        rows = self._rows(parsed, sids)
        known = {
            ITEM_IDS: parsed.items_N != UNKNOWN,
            USER_IDS: np.array([parsed.user_id != UNKNOWN]),
            HISTORY_IDS: parsed.history_ids_T != UNKNOWN,
        }
        with one_thread():
            p_TN = self._network.probabilities(rows, known, self._new_items(parsed, where)).T.tolist()
        return {"probabilities": dict(zip(self.features.tasks, p_TN, strict=True)), "unknown": parsed.unknown}

    def _sids_of(self, name: str, parsed: Parsed, where: str) -> dict[str, Integers]:
        """Return a set's SIDs by position, int64 [N, chunks]: of candidates and history entries, or of the user."""
        lookup = self._sids[name]
        if lookup.config.spec.entity == "user":
            return {"user": lookup.of(np.array([parsed.user_id]))}
        items_NC = lookup.of(parsed.items_N)
        new = [n for n in parsed.signals if items_NC[n, 0] == NULL]  # a published SID is kept
        if new:
            places = [f"{where}.candidates[{n}].signals" for n in new]
            items_NC[new] = lookup.encoded([parsed.signals[n] for n in new], places)
        return {"item": items_NC, "history": lookup.of(parsed.history_ids_T)}

    def _new_items(self, parsed: Parsed, where: str) -> NewItems | None:
        """Return candidates with raw embeddings in the request, unless the constant has embeddings of the item."""
        if self._raw is None:
            return None
        items_N = _replace_unknown(parsed.items_N, self.config.ranker.spec.num_items)
        new = [n for n in parsed.signals if not self._raw.known_I[items_N[n]]]
        if not new:
            return None
        places = [f"{where}.candidates[{n}].signals" for n in new]
        return NewItems(torch.tensor(new), self._raw.embeddings([parsed.signals[n] for n in new], places))

    def _rows(self, parsed: Parsed, sids: Mapping[str, Mapping[str, Integers]]) -> Rows:
        """Return the request as rows in the tables' format."""
        number = len(parsed.items_N)
        own: dict[str, pa.Array] = {
            ITEM_IDS: pa.array(_replace_unknown(parsed.items_N, self.config.ranker.spec.num_items))
        }
        user = np.array([parsed.user_id])
        shared: dict[str, pa.Array] = {
            USER_IDS: pa.array(_replace_unknown(user, self.config.ranker.spec.num_users)),
            "event_time": pa.array([parsed.time], pa.timestamp("us")),
            HISTORY_IDS: _one_list(pa.array(_replace_unknown(parsed.history_ids_T, self.config.ranker.spec.num_items))),
            "history_times": _one_list(pa.array(parsed.history_times_T, pa.timestamp("us"))),
        }
        spec = self.config.ranker.spec
        for columns, dense, sparse in (
            (own, spec.dense, spec.sparse), (shared, spec.request_dense, spec.request_sparse)
        ):  # fmt: skip
            columns |= {name: pa.array(parsed.dense[name], pa.float32()) for name in dense}
            columns |= {name: pa.array(parsed.sparse[name], pa.list_(pa.int64())) for name in sparse}
        for name, by_position in sids.items():
            whole = self.config.sids[name].spec
            for position, ids_NC in by_position.items():
                found = _sid_arrays(whole, position, ids_NC, self.features.sid_columns)
                if position == "item":
                    own |= found
                else:
                    shared |= {c: _one_list(ids) if position == "history" else ids for c, ids in found.items()}
        return Rows(pa.table(own), pa.table(shared), np.zeros(number, np.int64))


def load_answers(
    artifacts: Mapping[str, Path], config: Mapping[str, Any]
) -> Callable[[Sequence[Any]], list[ServedScores]]:
    """Load an exported ranker, and return a function that answers requests; see `ServedRanker.answer`.

    Args:
        artifacts: the version's folder, by name. config: empty; the folder has all settings.

    Raises:
        DataError, SpecError, ConfigError: see `ServedRanker`.
    """
    (folder,) = artifacts.values()
    served = ServedRanker(folder)
    return lambda requests: [served.answer(one, f"inputs[{n}]") for n, one in enumerate(requests)]


def read_config(folder: Path) -> ServedConfig:
    """Read a version's description, and check the digests of its files.

    Raises:
        DataError: a file is missing or altered. ConfigError: this version of the code cannot read the description.
    """
    try:
        values, _ = unseal((folder / SERVED_FILE).read_bytes(), SERVED_FILE)
    except (OSError, CommitError) as error:
        raise DataError(f"{folder}: not a served ranker: {error}") from error
    described = values.get("ranker")
    version = described.get("version") if isinstance(described, dict) else None
    config = parse_written(ServedConfig, values, SERVED_FILE, version)
    found = file_digests(folder)
    if found != config.files:
        differs = sorted(
            name for name in found.keys() | config.files.keys() if found.get(name) != config.files.get(name)
        )
        raise DataError(f"{folder}: {', '.join(differs[:4])}: missing, altered, or not of this version")
    return config


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a version except its description, by path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SERVED_FILE)
    return hash_all(folder, [file.relative_to(folder).as_posix() for file in files])


def _sid_lookup(folder: Path, config: ServedSids) -> SidLookup:
    bundle = load_bundle(folder / config.encoder_folder, torch.device("cpu"))
    served = {"signals": bundle.signals, "spec": config.spec, "stored": config.stored, "max_items": 2**31}
    encoder = ServedEncoder(bundle, ServedEncoderConfig.model_validate(served))
    shape = (config.rows, len(config.spec.chunk_sizes))
    return SidLookup(config, np.memmap(folder / config.map_file, np.int64, "r", shape=shape), encoder)


def _raw_lookup(content: Content, scales: Mapping[str, float], constants: ModelConstants) -> RawLookup | None:
    """Return the lookup for new items' raw embeddings; None if the ad's content has none, or no scale was stored."""
    if not content.embeddings or not scales:
        return None
    scales = {name: scales[name] for name in content.embeddings}
    return RawLookup(content.embeddings, scales, constants.embeddings["item"].ne(0).any(1))


def _constants(folder: Path) -> ModelConstants:
    """Return codebooks, and embeddings with one more row of zeros, for unknown ids."""
    try:
        found = load_file(folder / CONSTANTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error
    named: dict[str, dict[Any, Tensor]] = {CODEBOOK: {}, EMBEDDINGS: {}}
    for name, tensor in found.items():
        kind, _, own = name.partition(".")
        named[kind][own] = tensor
    nothing = {entity: rows_IE.new_zeros(1, rows_IE.shape[1]) for entity, rows_IE in named[EMBEDDINGS].items()}
    embeddings = {entity: torch.cat([rows_IE, nothing[entity]]) for entity, rows_IE in named[EMBEDDINGS].items()}
    return ModelConstants(named[CODEBOOK], embeddings)


def _load_network(body: Body, folder: Path) -> None:
    try:
        body.load_state_dict(load_file(folder / NETWORK_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{folder}: the network's weights do not fit: {error}") from error


def _tables(folder: Path) -> dict[str, ServedTable]:
    """Open the tables memory-mapped: rows that are never looked up are never read."""
    stored: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(folder / TABLES_FILE, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                table, _, part = key.rpartition("/")
                stored.setdefault(table, {})[part] = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: the tables cannot be read: {error}") from error
    return {table: ServedTable(parts) for table, parts in stored.items()}


def _replace_unknown(ids_N: Integers, number: int) -> Integers:
    """Return ids, with unknown ids replaced by `number`, the id after the last."""
    return np.where(ids_N == UNKNOWN, number, ids_N)


def _one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def _sid_arrays(whole: SidSpec, position: str, ids_NC: Integers, wanted: Mapping[str, SidSpec]) -> dict[str, pa.Array]:
    """Return the columns of a set at a position that the arm reads, null where there is no SID."""
    base = whole.event_history_base if position == "history" else whole.event_base
    null_N = ids_NC[:, 0] == NULL
    sids_NC = torch.from_numpy(np.where(null_N[:, None], 0, ids_NC))
    found = {}
    for column, part in position_columns(base, whole).items():
        if column in wanted:
            cut_NC = sids_NC if part.prefix is None else whole.cut(sids_NC, part.prefix)
            found[column] = pa.array(cut_NC[:, part.chunk].numpy(), mask=null_N)
    return found
