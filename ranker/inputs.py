"""The network's inputs beside looked-up vectors: plain tensors, which need neither torchrec nor fbgemm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sidestack.ranker.layout import HistoryLayout


@dataclass
class ModelInputs:
    """Inputs of B rows of R requests, whose histories have T entries in total.

    Values that the rows of a request share are stored once. Rows of a request are adjacent; if the order of the rows
    splits a request, each part counts as a request.

    Attributes:
        dense_BF: dense features.
        item_content_BC: the ids that the ad's content takes without a table (`ranker.features.Content`): its SIDs in C
            columns, set after set, or its own id (C = 0 for other content).
        item_known_BS: False where the ad's SID of a set is null (S = 0 if the arm does not need it).
        user_content_RC, user_known_RS: the user's, likewise.
        history_content_TC, history_known_TS: those of the history's entries, likewise.
        history_recency_FT: the age of each history entry, in F = 3 forms: log(1 + days) to the event,
            log(1 + days) since the entry before it (0 for the oldest), and log rank counted from the newest.
        history_lengths_R: entries of each request's history.
        request_B: the request of each row, from 0 to R - 1, non-decreasing.
        layout: which rows attend to which entries.
    """

    dense_BF: Tensor
    item_content_BC: Tensor
    item_known_BS: Tensor
    user_content_RC: Tensor
    user_known_RS: Tensor
    history_content_TC: Tensor
    history_known_TS: Tensor
    history_recency_FT: Tensor
    history_lengths_R: Tensor
    request_B: Tensor
    layout: HistoryLayout


class Vectors(NamedTuple):
    """Vectors that were looked up in tables, by feature.

    Attributes:
        of_row: pooled embeddings [B, d] of the rows' own bags. of_request: [R, d], of the requests' bags.
        of_entry: embeddings [T x ids an entry, d] of the histories.
    """

    of_row: Mapping[str, Tensor]
    of_request: Mapping[str, Tensor]
    of_entry: Mapping[str, Tensor]
