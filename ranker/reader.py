"""Parquet to batches: only the columns an arm needs, checked as they are read, without a Python loop over rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from encoder.sid import require_spec
from infra.checks import check_events
from infra.distributed import World, together
from infra.errors import DataError
from infra.impressions import ImpressionRows, columns_by_table
from infra.lanes import Batch, LaneReader
from infra.parquet import RowGroup
from infra.partitions import PartitionEntry
from infra.rows import Rows
from infra.snapshot import CONTENT, Dataset
from infra.tables import DatasetSpec
from ranker.batch import NOT_LAID_OUT, RankerBatch
from ranker.budget import DecidedTraining
from ranker.config import Dates, HistoryConfig
from ranker.features import HISTORY_IDS, ArmFeatures, IdFeature

Integers = npt.NDArray[np.int64]

WHOLE = 2**62
"""More rows than any request has."""
_DAYS_A_MICROSECOND = np.float32(1 / 86_400_000_000)


@dataclass(frozen=True)
class Split:
    """The dates (first and last) of a training or held-out split, and what an arm reads of them."""

    dates: Dates
    dataset: Dataset
    features: ArmFeatures

    def rows(self) -> ImpressionRows:
        """Return the split's impressions with the columns that the arm reads, checked as they are read.

        Raises:
            DataError: there are no events on these dates.
        """
        check = partial(check_rows, features=self.features, spec=self.dataset.spec)
        return ImpressionRows(self.dataset, *self.dates, self.features.columns, check)

    @property
    def partitions(self) -> list[PartitionEntry]:
        """The partitions that hold what the arm reads."""
        tables = columns_by_table(self.dataset, self.features.columns)
        return [
            entry for of_kind in tables for table in of_kind for entry in self.dataset.partitions(table, *self.dates)
        ]

    def open(self, training: DecidedTraining, world: World, is_training: bool) -> LaneReader:
        """Open the rows for training (shuffled by the seed, whole batches) or evaluation (in order, every row).

        Every rank calls; an error on one is raised on all.

        Raises:
            ConfigError: ranks, lanes and batch size do not divide. DataError: too few rows.
        """
        with together(world, "opening the events"):
            return LaneReader(
                self.rows(),
                batch_size=training.batch_size if is_training else training.eval_batch_size,
                lanes=training.lanes,
                rank=world.rank,
                world_size=world.size,
                seed=training.seed if is_training else None,
                windows=self.windows(training.window_days) if is_training else (0,),
                keep_rows=(training.rows_per_request or WHOLE) if is_training else 1,
            )

    def windows(self, days: int | None) -> tuple[int, ...]:
        """Return the row numbers at which windows of so many days begin; None: all dates are one window."""
        if days is None:
            return (0,)
        first, starts, rows = self.dates[0], {0: 0}, 0
        for entry in self.dataset.partitions("events", *self.dates):
            starts.setdefault((entry.date - first).days // days, rows)
            rows += entry.rows
        return tuple(sorted({start for start in starts.values() if start < max(rows, 1)}))


def content_read(dataset: Dataset, features: ArmFeatures) -> list[PartitionEntry]:
    """Return the partitions that hold the embeddings an arm takes as they are."""
    entities = {content.entity for content in features.contents if content.embeddings}
    return [entry for entity in sorted(entities) for entry in dataset.partitions(CONTENT[entity])]


def check_rows(table: pa.Table, where: RowGroup, *, features: ArmFeatures, spec: DatasetSpec) -> None:
    """Check rows of one table: its contract, and every SID of its spec and inside its digits' ids.

    fbgemm turns an id outside its table into a silent zero; here it is an error.

    Raises:
        DataError: naming file, row group, column and rule. SpecError: a column has SIDs of another spec or codebook.
    """
    check_events(table, spec, where)
    for column, sid in features.sid_columns.items():
        if column not in table.column_names:
            continue
        require_spec(table.schema, column, sid, where.path)
        first = 1 if sid.packing == "paper_eq5" else 0
        number = sid.radix ** (sid.chunk_sizes[sid.chunk] + first)
        _check_sids(table[column], column, number, where)


def _check_sids(column: pa.ChunkedArray, name: str, number: int, where: RowGroup) -> None:
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    if values.type != pa.int64():
        raise DataError(f"{where}: column {name!r} has type {column.type}, must hold int64")
    bounds = pc.min_max(values)
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    if low is not None and (low < 0 or high >= number):
        wrong = low if low < 0 else high
        raise DataError(f"{where}: column {name!r}: id {wrong} is outside [0, {number}), what its digits spell")


def to_ranker_batch(batch: Batch, features: ArmFeatures) -> RankerBatch:
    """Turn one rank's rows into what the model takes."""
    return next(_block(batch, features).split(len(batch.rows_N)))


def _block(batch: Batch, features: ArmFeatures) -> RankerBatch:
    """Turn the rows of several batches into one that is to be split; pointers and lengths are Arrow's buffers."""
    own, requests, request_B = batch.rows.own, batch.rows.shared, batch.rows.run_N
    assert requests is not None
    lengths_R = _array(requests, HISTORY_IDS).value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    labels_BT, weights_BT = _labels(batch, tuple(features.tasks))
    rows, runs, entries = own.num_rows, requests.num_rows, int(lengths_R.sum())
    return RankerBatch(
        bags=_bags(own, features.row_bags),
        request_bags=_bags(requests, features.request_bags),
        sequences=_sequences(requests, features.sequences, lengths_R),
        dense_BF=_dense(batch.rows, features.dense),
        item_content_BC=_side_by_side(own, features.item.columns, rows, np.int64),
        item_known_BS=_side_by_side(own, features.item.known, rows, np.bool_),
        user_content_RC=_side_by_side(requests, features.user.columns, runs, np.int64),
        user_known_RS=_side_by_side(requests, features.user.known, runs, np.bool_),
        history_content_TC=_side_by_side(requests, features.history.columns, entries, np.int64),
        history_known_TS=_side_by_side(requests, features.history.known, entries, np.bool_),
        history_recency_FT=_recency(requests, lengths_R),
        history_lengths_R=torch.from_numpy(lengths_R),
        request_B=torch.from_numpy(request_B),
        layout=NOT_LAID_OUT,
        labels_BT=labels_BT,
        weights_BT=weights_BT,
    )


def _array(table: pa.Table, column: str) -> pa.Array:
    chunked = table[column]
    return chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()


def _numpy(array: pa.Array) -> npt.NDArray[np.generic]:
    values: npt.NDArray[np.generic] = array.to_numpy(zero_copy_only=False)
    return values


def _labels(batch: Batch, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    labels_BT, weights_BT = np.empty((2, batch.table.num_rows, len(tasks)), np.float32)
    for place, task in enumerate(tasks):
        column = _array(batch.table, task)
        labels_BT[:, place] = _numpy(_without_nulls(column))
        weights_BT[:, place] = batch.valid_N & _known(column)
    return torch.from_numpy(labels_BT), torch.from_numpy(weights_BT)


def _dense(rows: Rows, names: tuple[str, ...]) -> Tensor:
    dense_BF = np.empty((rows.num_rows, len(names)), np.float32)
    for i, name in enumerate(names):
        dense_BF[:, i] = rows.column(name).to_numpy()
    return torch.from_numpy(dense_BF)


def _hashed(ids: Integers, feature: IdFeature) -> Integers:
    if not feature.is_hashed:
        return ids
    is_power_of_two = feature.rows & (feature.rows - 1) == 0  # the default; ids are never negative
    return ids & (feature.rows - 1) if is_power_of_two else ids % feature.rows


def _bags(table: pa.Table, features: tuple[IdFeature, ...]) -> KeyedJaggedTensor:
    ids, lengths = [], []
    for feature in features:
        columns = [_array(table, column) for column in feature.columns]
        if pa.types.is_list(columns[0].type):
            lengths.append(_numpy(columns[0].value_lengths()).astype(np.int32))
            columns = [column.flatten() for column in columns]
        else:
            lengths.append(_known(columns[0]) * np.int32(feature.ids_per_entry))
            columns = [column.drop_null() if column.null_count else column for column in columns]
        ids.append(_ids(columns, feature))
    return _keyed(features, ids, lengths)


def _sequences(table: pa.Table, features: tuple[IdFeature, ...], lengths_R: Integers) -> KeyedJaggedTensor:
    ids, lengths = [], []
    for feature in features:
        # A null SID holds its place in the sequence with id 0; the model masks what is looked up there.
        columns = [_without_nulls(_array(table, column).flatten()) for column in feature.columns]
        ids.append(_ids(columns, feature))
        lengths.append((lengths_R * feature.ids_per_entry).astype(np.int32))
    return _keyed(features, ids, lengths)


def _known(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Return whether values are there."""
    return _numpy(column.is_valid()).view(np.bool_) if column.null_count else np.ones(len(column), np.bool_)


def _without_nulls(column: pa.Array) -> pa.Array:
    return column.fill_null(0) if column.null_count else column


def _ids(columns: list[pa.Array], feature: IdFeature) -> Integers:
    """Return the ids to look up, of columns without nulls."""
    return _hashed(unhashed_ids(columns, feature), feature)


def unhashed_ids(columns: Sequence[pa.Array], feature: IdFeature) -> Integers:
    """Return the ids of a feature, before they are hashed into its table; all of an entry's one after another.

    Args:
        columns: those of the feature, without nulls. feature: the feature.
    """
    values = [_numpy(column).astype(np.int64, copy=False) for column in columns]
    if not feature.clusters:
        return values[0]
    assert feature.sid is not None
    held = feature.sid.of_prefix(sum(feature.sid.chunk_sizes[: len(values)]))
    digits_ND: Integers = held.unpack(torch.from_numpy(np.stack(values, axis=1))).numpy()
    return digits_ND[:, : feature.clusters].ravel()


def _keyed(
    features: tuple[IdFeature, ...], ids: list[Integers], lengths: list[npt.NDArray[np.int32]]
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[feature.column for feature in features],
        values=torch.from_numpy(np.concatenate(ids)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )


def _side_by_side(table: pa.Table, columns: tuple[str, ...], rows: int, kind: type[np.int64 | np.bool_]) -> Tensor:
    """Return the ids in some columns [rows, columns], 0 where null; or, asked for bool, whether they are not null."""
    out_NC = np.empty((rows, len(columns)), kind)
    for place, name in enumerate(columns):
        column = _array(table, name)
        values = column.flatten() if pa.types.is_list(column.type) else column
        out_NC[:, place] = _known(values) if kind is np.bool_ else _numpy(_without_nulls(values))
    return torch.from_numpy(out_NC)


def _recency(requests: pa.Table, lengths_R: Integers) -> Tensor:
    event_R = _numpy(_array(requests, "event_time").view(pa.int64()))
    entry_T = _numpy(_array(requests, "history_times").flatten().view(pa.int64()))
    oldest_R = np.cumsum(lengths_R) - lengths_R
    recency_FT = np.empty((3, len(entry_T)), np.float32)
    apart_T = np.repeat(event_R, lengths_R)
    apart_T -= entry_T
    recency_FT[0] = apart_T
    recency_FT[1, 1:] = np.subtract(entry_T[1:], entry_T[:-1], out=apart_T[1:])
    recency_FT[1, oldest_R[lengths_R > 0]] = 0
    recency_FT[:2] *= _DAYS_A_MICROSECOND
    recency_FT[:2] += 1  # by log, which is 8 times as fast as log1p; what a second adds is lost in neither
    np.log(recency_FT[:2], out=recency_FT[:2])
    log_ranks = np.log(np.arange(1, lengths_R.max(initial=0) + 1, dtype=np.float32))
    np.take(log_ranks, _rank_from_newest(lengths_R) - 1, out=recency_FT[2], mode="clip")  # other modes buffer it
    return torch.from_numpy(recency_FT)


def _rank_from_newest(lengths_R: Integers) -> Integers:
    """Number the entries of every history, oldest first as they are stored, from its length down to 1."""
    ranks_T: Integers = np.repeat(np.cumsum(lengths_R), lengths_R)
    ranks_T -= np.arange(len(ranks_T))
    return ranks_T


@dataclass
class NewestEntries:
    """Keeps the newest entries of histories, and counts what it leaves out.

    Attributes:
        settings: how many entries a history, and a global batch, may have; without bounds nothing is counted.
        entries: entries seen so far, without padding's; a row that is read again counts again.
        entries_cut: those of them left out.
    """

    settings: HistoryConfig = HistoryConfig()
    entries: int = 0
    entries_cut: int = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Both counts: entries seen, and entries left out."""
        return self.entries, self.entries_cut

    def of(self, batch: Batch, features: ArmFeatures, lane_batch: int, lanes: int) -> Batch:
        """Return the batch with every sequence column cut to the newest entries, all at the same places.

        Args:
            batch: of one rank, or of several batches in turn. features: name the columns.
            lane_batch: rows of a lane's share of a batch, which lie beside each other. lanes: of all ranks.
        """
        if self.settings.max_length is None and self.settings.max_entries is None:
            return batch
        requests, request_N = batch.rows.shared, batch.rows.run_N
        assert requests is not None
        lengths_R = _numpy(_array(requests, HISTORY_IDS).value_lengths()).astype(np.int64)
        kept_R = np.minimum(lengths_R, self.settings.max_length or WHOLE)
        if self.settings.max_entries is not None:
            first_R = np.flatnonzero(np.diff(request_N, prepend=-1))
            kept_R = fitting_lengths(kept_R, first_R // lane_batch, self.settings.max_entries // lanes)
        self.entries += int(lengths_R[request_N][batch.valid_N].sum())
        self.entries_cut += int((lengths_R - kept_R)[request_N][batch.valid_N].sum())
        if np.array_equal(kept_R, lengths_R):
            return batch
        is_kept_T = pa.array(_rank_from_newest(lengths_R) <= np.repeat(kept_R, lengths_R))
        offsets_R1 = pa.array(np.concatenate([[0], np.cumsum(kept_R)]).astype(np.int32))
        for column in features.sequence_columns:
            values = _array(requests, column).flatten().filter(is_kept_T)
            at, field = requests.schema.get_field_index(column), requests.schema.field(column)
            requests = requests.set_column(at, field, pa.ListArray.from_arrays(offsets_R1, values, type=field.type))
        return batch._replace(rows=replace(batch.rows, shared=requests))


def fitting_lengths(lengths_R: Integers, share_R: Integers, most: int) -> Integers:
    """Return lengths of which each share has at most so many entries: the longest of a share are cut to one length.

    Args:
        lengths_R: of histories. share_R: the share of each, ascending from 0. most: entries of a share.
    """
    fitting_R = lengths_R.copy()
    for share in np.flatnonzero(np.bincount(share_R, lengths_R) > most):
        own = share_R == share
        ascending_R = np.sort(lengths_R[own])
        before_R = np.cumsum(ascending_R) - ascending_R
        level_R = (most - before_R) // np.arange(len(ascending_R), 0, -1)  # if all shorter ones are kept whole
        fitting_R[own] = np.minimum(lengths_R[own], level_R[np.argmax(level_R < ascending_R)])
    return fitting_R


def ranker_batches(
    reader: LaneReader,
    epochs: range,
    start: int,
    features: ArmFeatures,
    newest: NewestEntries,
    world: World,
    seen: Callable[[Batch], None],
) -> Iterator[RankerBatch]:
    """Convert batches as they come, in pinned memory where a GPU will copy them.

    Args:
        reader: the rows. epochs: which to read, one after another. start: the first batch of the first epoch.
        features: what the arm reads. newest: cuts long histories. world: the process group.
        seen: called with every source batch, in order, for who needs the rows beside the tensors.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # a thread that reads ahead begins with the first
    rows = reader.batch_rows
    for block in reader.blocks(epochs, start):
        whole = _block(newest.of(block, features, reader.lane_batch, reader.lanes), features)
        for batch, converted in zip(block.split(rows), whole.split(rows), strict=True):
            seen(batch)
            yield converted.pin_memory() if world.device.type == "cuda" else converted
