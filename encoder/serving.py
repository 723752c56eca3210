"""Serve an encoder: items as plain values in, SIDs and digits out; errors name the item, signal and rule.

This module does not depend on MLflow (`encoder/served_model.py` does). An item is a mapping from signal to value; a
signal that is absent or null is missing, as in the items table. The SIDs are those that `materialize` writes: same
weights, same packing, embeddings rounded as the tables store them, and for a single item the same last bits as in a
whole block of rows (`exact_rows`).
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, SkipValidation, create_model

from sidestack.encoder.bundle import WEIGHTS_FILE, EncoderBundle, load_bundle
from sidestack.encoder.encoding import BLOCK_ROWS, encode, one_thread
from sidestack.encoder.sid.columns import content_columns
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import Precision, SignalBatch, SignalSpec
from sidestack.infra.config import Config, parse
from sidestack.infra.errors import DataError, SpecError, short

Item = Mapping[str, Any]
ServedSid = dict[str, Any]

EXACT_IN_JSON = 2**53
"""Integers below this are exact in every JSON reader; many read numbers as doubles."""

BEYOND_FLOAT32 = 1e39
"""Numbers of at least this size are not finite in float32."""

_FEW = (16, 64)
"""Block sizes to try for few items, see `exact_rows`; 16 rows cost little more than one."""


class ServedConfig(Config):
    """The served model's configuration, besides its weights."""

    signals: SignalSpec
    spec: SidSpec
    """The tables' spec, with packing and fingerprint."""
    stored: dict[str, Precision]
    """Precision in which the tables store each embedding. A request's numbers are rounded to it, so
    that an item gets the SID it would have if it were in the tables."""
    max_items: PositiveInt
    """Maximum number of items per request."""


def sid_is_text(spec: SidSpec) -> bool:
    """Return whether ids are returned as decimal text, because some are too large to be exact in JSON."""
    first = 1 if spec.packing == "paper_eq5" else 0
    return bool(spec.radix ** (max(spec.chunk_sizes) + first) > EXACT_IN_JSON)


def item_type(signals: SignalSpec) -> type[BaseModel]:
    """Make the type of a request's item, from which MLflow reads the signature.

    It declares types without checking them, and accepts unknown keys: `ServedEncoder` checks items, with messages that
    do not repeat the whole input.

    Raises:
        DataError: a signal's name is not allowed for a field of a pydantic model.
    """
    for name in signals.names:
        if name.startswith("_") or (name.startswith("model_") and hasattr(BaseModel, name)):
            raise DataError(f"signal {name!r}: cannot be served; a name must not begin with _ or be one of pydantic's")
    fields: dict[str, Any] = {name: (_unchecked(list[float]), None) for name in signals.embeddings}
    fields |= {name: (_unchecked(int), None) for name in signals.categoricals}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a signal may be called "copy", which is also a method of models
        return create_model("Item", __config__=ConfigDict(extra="allow", protected_namespaces=()), **fields)


def answer_type(spec: SidSpec) -> type[BaseModel]:
    """Make the type of an answer: the items table's SID columns, and the digits; all null for a null SID."""
    sid: Any = str if sid_is_text(spec) else int
    fields: dict[str, Any] = {name: (_unchecked(sid), None) for name in content_columns(spec)}
    return create_model("Answer", **fields, digits=(_unchecked(list[int]), None))


def _unchecked(kind: Any) -> Any:
    return SkipValidation[kind | None]  # type: ignore[misc]  # a type made at run time


def require_same_encoder(encoder: SidSpec, sids: SidSpec) -> None:
    """Check that SIDs are in the generation of the encoder to serve, which may have been refreshed since.

    Raises:
        SpecError: names both fingerprints.
    """
    if encoder.fingerprint != sids.fingerprint:
        raise SpecError(
            f"the encoder's fingerprint is {encoder.fingerprint[:16]}…, the SIDs' is {sids.fingerprint[:16]}…:"
            " the tables were encoded by another encoder"
        )


class ServedEncoder:
    """An encoder that answers requests. It has no state between requests, so threads may share it."""

    def __init__(self, bundle: EncoderBundle, config: ServedConfig) -> None:
        """Take a loaded bundle.

        Raises:
            SpecError: see `require_same_encoder`.
        """
        require_same_encoder(bundle.spec, config.spec)
        self._bundle = bundle
        self._config = config
        self._columns = tuple(content_columns(config.spec))
        self._number = str if sid_is_text(config.spec) else int
        self._few = exact_rows(bundle)

    def answers(self, items: Sequence[Item]) -> list[ServedSid]:
        """Return SID columns and digits of each item; all None where an item has no signal.

        Raises:
            DataError: names item, signal and rule.
        """
        if len(items) > self._config.max_items:
            raise DataError(f"inputs: {len(items)} items, a request may hold {self._config.max_items}")
        if not items:
            return []
        ids_NC = self._ids(served_batch(items, self._config.signals, self._config.stored))
        null_N = ids_NC[:, 0] == NULL
        digits_ND = self._config.spec.unpack(torch.from_numpy(np.where(null_N[:, None], 0, ids_NC)))
        rows = zip(ids_NC.tolist(), digits_ND.tolist(), null_N.tolist(), strict=True)
        return [self._answer(ids, digits, is_null) for ids, digits, is_null in rows]

    def ids(self, items: Sequence[Item], places: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the SIDs of items, int64 [N, chunks]; `NULL` where an item has no signal.

        Args:
            items: at least one. places: the name of each in messages.

        Raises:
            DataError: names item, signal and rule.
        """
        return self._ids(served_batch(items, self._config.signals, self._config.stored, places))

    def _ids(self, batch: SignalBatch) -> npt.NDArray[np.int64]:
        """Return the SIDs that `encode` computes; few items are encoded in a small block."""
        block_rows = self._few if len(batch) <= self._few else BLOCK_ROWS
        return encode(self._bundle, self._config.spec, batch, block_rows)

    def _answer(self, ids: list[int], digits: list[int], is_null: bool) -> ServedSid:
        sids = {name: None if is_null else self._number(i) for name, i in zip(self._columns, ids, strict=True)}
        return {**sids, "digits": None if is_null else digits}


def load_answers(
    artifacts: Mapping[str, Path], config: Mapping[str, Any]
) -> Callable[[Sequence[Any]], list[ServedSid]]:
    """Load an exported encoder, and return the function that answers items; see `ServedEncoder.answers`.

    Args:
        artifacts: the bundle's files, by name. config: a `ServedConfig`, as plain data.

    Raises:
        SpecError: the SIDs are another encoder's. CommitError, ConfigError: the bundle cannot be read.
    """
    bundle = load_bundle(artifacts[WEIGHTS_FILE].parent, torch.device("cpu"))
    return ServedEncoder(bundle, parse(ServedConfig, config, "the served model's configuration")).answers


def exact_rows(bundle: EncoderBundle) -> int:
    """Find the smallest block of rows for which the network's result is bit-identical to that with `BLOCK_ROWS` rows.

    A matrix product may sum in another order for fewer rows, and the last bit decides a code on a border. The order
    does not depend on the numbers: if it is another one, some of 256 rows of random numbers differ.

    Returns:
        one of `_FEW`, or BLOCK_ROWS if none of them is bit-identical.
    """
    batch = _random_batch(bundle.signals, torch.Generator().manual_seed(0))
    with torch.inference_mode(), one_thread():
        for rows in _FEW:
            if all(
                torch.equal(torch.cat([function(block) for block in batch.blocks(rows)]), function(batch))
                for function in (bundle.model.encoder, bundle.model.digits)
            ):
                return rows
    return BLOCK_ROWS


def _random_batch(signals: SignalSpec, generator: torch.Generator) -> SignalBatch:
    def integers(below: int) -> torch.Tensor:
        return torch.randint(below, (BLOCK_ROWS,), generator=generator)

    return SignalBatch(
        {name: torch.randn(BLOCK_ROWS, dim, generator=generator) for name, dim in signals.embeddings.items()},
        {name: integers(cardinality) for name, cardinality in signals.categoricals.items()},
        {name: integers(4) > 0 for name in signals.names},
    )


def served_batch(
    items: Sequence[Item], signals: SignalSpec, stored: Mapping[str, Precision], places: Sequence[str] | None = None
) -> SignalBatch:
    """Convert items to tensors.

    Args:
        items: their signals. signals: the model's. stored: precision of each embedding, see `ServedConfig`.
        places: the name of each item in messages; by default ``inputs[0]`` and so on.

    Raises:
        DataError: a signal is unknown, of a wrong type or dimension, not finite, or out of range.
    """
    places = places or [f"inputs[{row}]" for row in range(len(items))]
    for place, item in zip(places, items, strict=True):
        if not isinstance(item, Mapping):
            raise DataError(f"{place}: must be an object, is {short(item)}")
        for name in item:
            if name not in signals.names:
                raise DataError(f"{place}: unknown signal {short(name)}; the model takes {', '.join(signals.names)}")
    present_N = {name: np.array([item.get(name) is not None for item in items]) for name in signals.names}
    embeddings = {
        name: _embeddings([item.get(name) for item in items], name, dim, stored[name], places)
        for name, dim in signals.embeddings.items()
    }
    categoricals = {
        name: _categoricals([item.get(name) for item in items], name, cardinality, places)
        for name, cardinality in signals.categoricals.items()
    }
    return SignalBatch(
        {name: torch.from_numpy(x_ND) for name, x_ND in embeddings.items()},
        {name: torch.from_numpy(ids_N) for name, ids_N in categoricals.items()},
        {name: torch.from_numpy(mask_N) for name, mask_N in present_N.items()},
    )


def _embeddings(values: list[Any], name: str, dim: int, stored: str, places: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return float32 [N, dim], zeros where a value is None."""
    x_ND = np.zeros((len(values), dim))
    for row, value in enumerate(values):
        if value is not None:
            x_ND[row] = _vector(value, f"{places[row]}.{name}", dim)
    with np.errstate(over="ignore"):  # reported below
        # Rounded through float32, the dtype that embeddings are computed in: rounding twice is not rounding once.
        rounded_ND = x_ND.astype(np.float32).astype(stored).astype(np.float32)
    wrong = np.argwhere(~np.isfinite(rounded_ND))
    if len(wrong):
        row, at = wrong[0].tolist()
        beyond = f"is beyond {stored}, in which the tables store it"
        rule = beyond if np.isfinite(x_ND[row, at]) else "is not finite"
        raise DataError(f"{places[row]}.{name}[{at}]: {short(values[row][at])} {rule}")
    return rounded_ND


def _vector(value: Any, where: str, dim: int) -> npt.NDArray[Any]:
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"{where}: must be a list of {dim} numbers, is {short(value)}")
    if len(value) != dim:
        raise DataError(f"{where}: has {len(value)} numbers, must have {dim}")
    # Without an explicit dtype, numpy keeps text, null and nested lists distinct from numbers.
    try:
        x_D = np.asarray(value)
    except ValueError:
        x_D = np.empty(0, object)
    if x_D.ndim != 1 or x_D.dtype.kind not in "fiu":
        for at, part in enumerate(value):
            if not _is_number(part):
                raise DataError(f"{where}[{at}]: must be a number, is {short(part)}")
        return np.array([part if abs(part) < BEYOND_FLOAT32 else math.inf for part in value])  # integers beyond 64 bits
    return x_D


def _categoricals(values: list[Any], name: str, cardinality: int, places: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return int64 [N], 0 where a value is None; 3.0 counts as 3, because some JSON writers have only doubles."""
    ids_N = np.zeros(len(values), np.int64)
    for row, value in enumerate(values):
        if value is None:
            continue
        if not _is_number(value) or value != value // 1:
            raise DataError(f"{places[row]}.{name}: must be an integer, is {short(value)}")
        if not 0 <= value < cardinality:
            raise DataError(f"{places[row]}.{name}: {short(value)} is outside [0, {cardinality})")
        ids_N[row] = int(value)
    return ids_N


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
