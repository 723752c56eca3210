"""The network over tables in this process's memory, for serving and inspection."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sidestack.infra.rows import Rows
from sidestack.ranker.body import Body
from sidestack.ranker.content import NewItems
from sidestack.ranker.convert import JaggedIds, bag_ids, model_inputs, sequence_ids
from sidestack.ranker.features import ArmFeatures
from sidestack.ranker.id_feature import IdFeature
from sidestack.ranker.inputs import Vectors
from sidestack.ranker.serving.tables import ServedTable

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class LocalNetwork:
    """A ranker's network and tables, without torchrec. It keeps no state between calls, so threads may share it.

    Args of the constructor:
        features: what the arm reads. body: the network, loaded. tables: by name.
    """

    def __init__(self, features: ArmFeatures, body: Body, tables: Mapping[str, ServedTable]) -> None:
        self.features, self._body, self._tables = features, body.eval(), tables

    @torch.inference_mode()
    def probabilities(
        self, rows: Rows, known: Mapping[str, npt.NDArray[np.bool_]] | None = None, new: NewItems | None = None
    ) -> Floats:
        """Return the probability of each task, given that its ancestors happened, float32 [N, tasks].

        Args:
            rows: the impressions, with their requests.
            known: by column of ids, False where an id is unknown and has no row of its own. Its vector is zeros; in a
                table with admission it is a fallback row's, as for ids without a row in training.
            new: rows with raw embeddings of their own.
        """
        vectors = self._vectors(rows, known or {})
        p_NT: Floats = self._body(model_inputs(rows, self.features), vectors, new).sigmoid().numpy()
        return p_NT

    def _vectors(self, rows: Rows, known: Mapping[str, npt.NDArray[np.bool_]]) -> Vectors:
        assert rows.shared is not None
        features = self.features
        of_row = self._pooled(features.row_bags, bag_ids(rows.own, features.row_bags))
        of_request = self._pooled(features.request_bags, bag_ids(rows.shared, features.request_bags))
        entries = zip(features.sequences, sequence_ids(rows.shared, features.sequences).ids, strict=True)
        of_entry = {one.column: self._tables[one.table].rows(self._places(one, ids_N)) for one, ids_N in entries}
        masked = known.keys() - {one.column for one in features.tables if one.has_admission}
        for vectors in (of_row, of_request, of_entry):
            for column in vectors.keys() & masked:
                vectors[column] = vectors[column] * torch.from_numpy(known[column])[:, None]
        return Vectors(of_row, of_request, of_entry)

    def _pooled(self, features: Sequence[IdFeature], found: JaggedIds) -> dict[str, Tensor]:
        return {
            one.column: self._tables[one.table].pooled(self._places(one, ids_N), torch.from_numpy(lengths_B))
            for one, ids_N, lengths_B in zip(features, found.ids, found.lengths, strict=True)
        }

    def _places(self, feature: IdFeature, ids_N: Integers) -> Tensor:
        """Return rows of a table; an unknown id, beyond the table, gets the last row."""
        return torch.from_numpy(np.minimum(ids_N, self._tables[feature.table].num_rows - 1))
