"""Rows as tensors: the network's inputs and the ids to look up, without a Python loop over rows.

Nothing here needs torchrec: a served model converts requests by the same code as training converts rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from sidestack.infra.rows import Rows
from sidestack.ranker.features import HISTORY_IDS, ArmFeatures
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.inputs import ModelInputs
from sidestack.ranker.layout import HistoryLayout, Integers, history_layout

_DAYS_A_MICROSECOND = np.float32(1 / 86_400_000_000)
_NOT_LAID_OUT = HistoryLayout((), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class JaggedIds(NamedTuple):
    """Ids to look up, by feature.

    Attributes:
        ids: int64, of all rows concatenated. lengths: int32, how many ids each row has.
    """

    ids: list[Integers]
    lengths: list[npt.NDArray[np.int32]]


def model_inputs(rows: Rows, features: ArmFeatures, is_laid_out: bool = True) -> ModelInputs:
    """Return the network's inputs; lengths and values are Arrow's own buffers where possible.

    Args:
        rows: the rows with their requests. features: what the arm reads.
        is_laid_out: False leaves the layout out, for rows that are split into batches later.
    """
    own, requests, request_B = rows.own, rows.shared, rows.run_N
    assert requests is not None
    lengths_R = history_lengths(requests)
    number, runs, entries = own.num_rows, requests.num_rows, int(lengths_R.sum())
    layout = history_layout(lengths_R, np.bincount(request_B, minlength=runs)) if is_laid_out else _NOT_LAID_OUT
    return ModelInputs(
        dense_BF=_dense(rows, features.dense),
        item_content_BC=_side_by_side(own, features.item.columns, number, np.int64),
        item_known_BS=_side_by_side(own, features.item.known, number, np.bool_),
        user_content_RC=_side_by_side(requests, features.user.columns, runs, np.int64),
        user_known_RS=_side_by_side(requests, features.user.known, runs, np.bool_),
        history_content_TC=_side_by_side(requests, features.history.columns, entries, np.int64),
        history_known_TS=_side_by_side(requests, features.history.known, entries, np.bool_),
        history_recency_FT=_recency(requests, lengths_R),
        history_lengths_R=torch.from_numpy(lengths_R),
        request_B=torch.from_numpy(request_B),
        layout=layout,
    )


def history_lengths(requests: pa.Table) -> Integers:
    """Return the number of entries of each request's history, int64 [R]."""
    lengths_R: Integers = as_numpy(as_array(requests, HISTORY_IDS).value_lengths()).astype(np.int64)
    return lengths_R


def rank_from_newest(lengths_R: Integers) -> Integers:
    """Number each history's entries, stored oldest first, from its length down to 1."""
    ranks_T: Integers = np.repeat(np.cumsum(lengths_R), lengths_R)
    ranks_T -= np.arange(len(ranks_T))
    return ranks_T


def bag_ids(table: pa.Table, features: tuple[IdFeature, ...]) -> JaggedIds:
    """Return the ids of the bags of a table's rows."""
    ids, lengths = [], []
    for feature in features:
        columns = [as_array(table, column) for column in feature.columns]
        if pa.types.is_list(columns[0].type):
            lengths.append(as_numpy(columns[0].value_lengths()).astype(np.int32))
            columns = [column.flatten() for column in columns]
        else:
            lengths.append(known(columns[0]) * np.int32(feature.ids_per_entry))
            columns = [column.drop_null() if column.null_count else column for column in columns]
        ids.append(_ids(columns, feature))
    return JaggedIds(ids, lengths)


def sequence_ids(table: pa.Table, features: tuple[IdFeature, ...]) -> JaggedIds:
    """Return the ids of the histories of a table's requests."""
    ids, lengths, lengths_R = [], [], history_lengths(table)
    for feature in features:
        # A null SID keeps its place in the sequence with id 0; the model masks the vector looked up there.
        columns = [without_nulls(as_array(table, column).flatten()) for column in feature.columns]
        ids.append(_ids(columns, feature))
        lengths.append((lengths_R * feature.ids_per_entry).astype(np.int32))
    return JaggedIds(ids, lengths)


def _ids(columns: list[pa.Array], feature: IdFeature) -> Integers:
    """Return the table rows to look up, from columns without nulls."""
    return rows_of(unhashed_ids(columns, feature), feature)


def unhashed_ids(columns: Sequence[pa.Array], feature: IdFeature) -> Integers:
    """Return the ids of a feature, not the rows of its table; the ids of one entry are adjacent.

    Args:
        columns: those of the feature, without nulls. feature: the feature.
    """
    values = [as_numpy(column).astype(np.int64, copy=False) for column in columns]
    if not feature.clusters:
        return values[0]
    assert feature.sid is not None
    held = feature.sid.of_prefix(sum(feature.sid.chunk_sizes[: len(values)]))
    digits_ND: Integers = held.unpack(torch.from_numpy(np.stack(values, axis=1))).numpy()
    return digits_ND[:, : feature.clusters].ravel()


def rows_of(ids: Integers, feature: IdFeature) -> Integers:
    """Return the row of its table that each id is looked up in, int64."""
    if feature.has_admission:
        return _mapped(ids, feature)
    if not feature.is_hashed:
        return ids
    is_power_of_two = feature.rows & (feature.rows - 1) == 0  # the default; ids are never negative
    return ids & (feature.rows - 1) if is_power_of_two else ids % feature.rows


def _mapped(ids: Integers, feature: IdFeature) -> Integers:
    row_I = feature.row_map
    assert row_I is not None, f"{feature.table}: its row map was not read"
    if ids.max(initial=-1) < len(row_I):
        return row_I[ids].astype(np.int64)
    is_known = ids < len(row_I)
    rows = ids % feature.fallback_rows
    rows[is_known] = row_I[ids[is_known]]
    return rows


def as_array(table: pa.Table, column: str) -> pa.Array:
    """Return a column as one contiguous array."""
    chunked = table[column]
    return chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()


def as_numpy(array: pa.Array) -> npt.NDArray[np.generic]:
    """Return an array's values, without a copy where there is no null."""
    values: npt.NDArray[np.generic] = array.to_numpy(zero_copy_only=False)
    return values


def known(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which values are not null."""
    return as_numpy(column.is_valid()).view(np.bool_) if column.null_count else np.ones(len(column), np.bool_)


def without_nulls(column: pa.Array) -> pa.Array:
    """Return the values, with 0 for nulls."""
    return column.fill_null(0) if column.null_count else column


def _dense(rows: Rows, names: tuple[str, ...]) -> Tensor:
    dense_BF = np.empty((rows.num_rows, len(names)), np.float32)
    for i, name in enumerate(names):
        dense_BF[:, i] = rows.column(name).to_numpy()
    return torch.from_numpy(dense_BF)


def _side_by_side(table: pa.Table, columns: tuple[str, ...], rows: int, kind: type[np.int64 | np.bool_]) -> Tensor:
    """Return the ids in some columns [rows, columns], 0 where null; with kind bool, whether they are not null."""
    out_NC = np.empty((rows, len(columns)), kind)
    for place, name in enumerate(columns):
        column = as_array(table, name)
        values = column.flatten() if pa.types.is_list(column.type) else column
        out_NC[:, place] = known(values) if kind is np.bool_ else as_numpy(without_nulls(values))
    return torch.from_numpy(out_NC)


def _recency(requests: pa.Table, lengths_R: Integers) -> Tensor:
    event_R = as_numpy(as_array(requests, "event_time").view(pa.int64()))
    entry_T = as_numpy(as_array(requests, "history_times").flatten().view(pa.int64()))
    oldest_R = np.cumsum(lengths_R) - lengths_R
    recency_FT = np.empty((3, len(entry_T)), np.float32)
    apart_T = np.repeat(event_R, lengths_R)
    apart_T -= entry_T
    recency_FT[0] = apart_T
    recency_FT[1, 1:] = np.subtract(entry_T[1:], entry_T[:-1], out=apart_T[1:])
    recency_FT[1, oldest_R[lengths_R > 0]] = 0
    recency_FT[:2] *= _DAYS_A_MICROSECOND
    recency_FT[:2] += 1  # log is 8 times as fast as log1p, and still resolves a second
    np.log(recency_FT[:2], out=recency_FT[:2])
    log_ranks = np.log(np.arange(1, lengths_R.max(initial=0) + 1, dtype=np.float32))
    np.take(log_ranks, rank_from_newest(lengths_R) - 1, out=recency_FT[2], mode="clip")  # other modes buffer the output
    return torch.from_numpy(recency_FT)
