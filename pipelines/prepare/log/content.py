"""The content of items and users: texts and vectors as embeddings, categorical values as vocabulary ids.

Vocabularies are made from the first part and kept. A value that is not in the vocabulary is `UNKNOWN`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sidestack.infra.config import digest
from sidestack.infra.errors import DataError
from sidestack.infra.parquet import read_row_group, row_groups
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.sql import file_list, literal, quoted
from sidestack.infra.store import Store
from sidestack.infra.tables import ContentSpec, DatasetSpec, Entity, content_schema
from sidestack.pipelines.prepare.columns import embeddings
from sidestack.pipelines.prepare.contract import Part
from sidestack.pipelines.prepare.log.config import ContentFiles
from sidestack.pipelines.prepare.log.numbering import Numbering, create_once
from sidestack.pipelines.prepare.text import read_embeddings

UNKNOWN = 0
"""The id of every value that is not in the vocabulary."""
TEXT_EMBEDDING = "text_embedding"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Content:
    """The content of the items, or of the users.

    Attributes:
        numbering: their ids. parts: the numbering's parts in this snapshot. files: their settings.
        vocabularies: categorical -> its values in the order of their ids, which begin with 1.
        dims: embedding column -> dimensions. texts: by part, the cache of its texts' embeddings.
    """

    numbering: Numbering
    parts: Sequence[PartitionEntry]
    files: ContentFiles | None
    vocabularies: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    texts: Sequence[Path] = ()

    @property
    def rows(self) -> int:
        """Number of items (users)."""
        return sum(part.facts["new"] for part in self.parts)

    def dataset_parts(self, spec: DatasetSpec) -> list[Part]:
        """Return the parts for `pipelines.prepare.contract.Source`."""
        entity = self.numbering.entity
        key = pa.field(f"{entity}_key", pa.string())
        schema = pa.schema([*content_schema(spec, entity), key])
        found = []
        for number, part in enumerate(self.parts):
            decides = {
                "rows": part.digest,
                "vocabularies": digest(dict(self.vocabularies)),
                "texts": self.texts[number].name if self.texts else "",
            }
            origin = f"{self.numbering.table}/{part.slice}"
            found.append(Part(origin, digest(decides), schema, partial(self._chunks, number, spec, schema)))
        return found

    def _chunks(self, number: int, spec: DatasetSpec, schema: pa.Schema) -> Iterator[pa.Table]:
        entity = self.numbering.entity
        vectors = self._text_vectors(number) if self.texts else None
        for group in row_groups([self.numbering.store.file(self.parts[number])]):
            rows = read_row_group(group)
            yield self._converted(rows, spec.content(entity), schema, vectors, str(group))

    def _converted(
        self, rows: pa.Table, content: ContentSpec, schema: pa.Schema, texts: "TextVectors | None", where: str
    ) -> pa.Table:
        columns: dict[str, Any] = {content.id_column: rows["id"], f"{self.numbering.entity}_key": rows["key"]}
        if "text" in schema.names:
            columns["text"] = rows["text"] if "text" in rows.column_names else pa.nulls(rows.num_rows, pa.string())
        for name, dim in content.embeddings.items():
            if name == TEXT_EMBEDDING and texts is not None:
                columns[name] = texts.column(rows["text"])
            else:
                columns[name] = unit_vectors(rows[f"vector:{name}"], dim, f"{where}: column {name!r}")
        for name in content.categoricals:
            columns[name] = value_ids(rows[f"value:{name}"], self.vocabularies[name])
        return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)

    def _text_vectors(self, number: int) -> "TextVectors":
        return TextVectors(distinct_texts(self.numbering.store, self.parts[number]), self.texts[number])


class TextVectors:
    """The embeddings of a part's texts.

    Args of the constructor:
        texts: distinct, ascending. cached: their embeddings' directory in the cache of `pipelines.prepare.text`.
    """

    def __init__(self, texts: Sequence[str], cached: Path) -> None:
        self._texts = pa.array(texts, pa.string())
        self._vectors_ND = read_embeddings(cached, len(texts))

    def column(self, texts: pa.ChunkedArray) -> pa.Array:
        """Return the embeddings of texts, null for a null text."""
        places = pc.index_in(texts.combine_chunks(), self._texts, skip_nulls=True)
        return embeddings(
            self._vectors_ND[places.fill_null(0).to_numpy()], places.is_valid().to_numpy(zero_copy_only=False)
        )


def distinct_texts(store: Store, part: PartitionEntry) -> list[str]:
    """Return the distinct texts of a part, ascending."""
    parts = [read_row_group(group, ["text"])["text"] for group in row_groups([store.file(part)])]
    found = pc.unique(pa.chunked_array([chunk for part in parts for chunk in part.chunks], pa.string()))
    return sorted(found.drop_null().to_pylist())


def value_ids(values: pa.ChunkedArray, vocabulary: Sequence[str]) -> pa.Array:
    """Return the ids of values as int32, null for a null value."""
    column = values.combine_chunks()
    places = pc.index_in(column, pa.array(vocabulary, pa.string()), skip_nulls=True)
    ids = pc.fill_null(pc.add(places, 1), UNKNOWN).cast(pa.int32())
    return pc.if_else(column.is_valid(), ids, pa.scalar(None, pa.int32()))


def unit_vectors(column: pa.ChunkedArray, dim: int, where: str) -> pa.Array:
    """Return vectors at unit length as fixed-size lists of float16, null if a vector is null or all zeros.

    Raises:
        DataError: a vector is of another length.
    """
    whole = column.combine_chunks()
    lengths = pc.unique(pc.list_value_length(whole).drop_null()).to_pylist()
    if any(length != dim for length in lengths):
        raise DataError(f"{where}: embeddings must have {dim} numbers; found {sorted(lengths)}")
    is_there_N = whole.is_valid().to_numpy(zero_copy_only=False)
    values_ND = np.zeros((len(whole), dim), np.float32)
    values_ND[is_there_N] = whole.drop_null().flatten().to_numpy().reshape(-1, dim)
    largest_N1 = np.abs(values_ND).max(axis=1, initial=0.0, keepdims=True)
    scaled_ND = values_ND / np.where(largest_N1 > 0, largest_N1, 1)  # so that squares do not overflow
    lengths_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    units_ND = scaled_ND / np.where(lengths_N1 > 0, lengths_N1, 1)
    return embeddings(units_ND.astype(np.float16), is_there_N & (largest_N1[:, 0] > 0))


@dataclass(frozen=True)
class VocabularyRule:
    """Rule for the values that a vocabulary keeps.

    Attributes:
        most: maximum number of values, the most frequent first. min_users: minimum number of distinct users of a value.
    """

    most: int
    min_users: int | None

    @property
    def settings(self) -> dict[str, int]:
        """The settings that decide the values, for keys."""
        return {"most": self.most, **({} if self.min_users is None else {"min_users": self.min_users})}

    def query(self, source: str, column: str, seen: str) -> str:
        """Return the query of a column's values.

        Args:
            source: rows whose values are counted. column: the values' column.
            seen: query of (value, user): the users who have, or met, a value.
        """
        name = quoted(column)
        common = f"SELECT value FROM ({seen}) GROUP BY value HAVING count(DISTINCT user) >= {self.min_users}"
        is_common = "" if self.min_users is None else f" AND {name} IN ({common})"
        return (
            f"SELECT {name} AS value, count(*) AS rows FROM {source} WHERE {name} IS NOT NULL{is_common} GROUP BY value"
            f" ORDER BY rows DESC, value LIMIT {self.most}"
        )


def vocabularies(
    numbering: Numbering,
    first: PartitionEntry,
    files: ContentFiles,
    kept: VocabularyRule,
    events: str,
    database: duckdb.DuckDBPyConnection,
) -> dict[str, list[str]]:
    """Return each categorical's values, most frequent first, from the first part.

    Args:
        numbering: the ids. first: its first part. files: the settings. kept: the rule for values.
        events: the events' rows, as SQL: they show who met an item. database: a connection.
    """
    source = f"read_parquet({literal(str(numbering.store.file(first)))})"
    found = {}
    for name in files.categoricals:
        column = quoted(f"value:{name}")
        seen = f"SELECT {column} AS value, key AS user FROM {source}"
        if numbering.entity == "item":
            seen = (
                f"SELECT part.{column} AS value, user_key AS user FROM {source} AS part JOIN {events} ON item_key = key"
            )
        query = kept.query(source, f"value:{name}", seen)
        settings = {"of": numbering.settings, **kept.settings}
        file = create_once(numbering.store, database, f"{numbering.entity}.{name}", settings, query)
        found[name] = read_values(database, file)
    return found


def read_values(database: duckdb.DuckDBPyConnection, file: Path) -> list[str]:
    """Return the values of a vocabulary's file, in order."""
    return [value for (value,) in database.execute(f"SELECT value FROM read_parquet({literal(str(file))})").fetchall()]


def embedding_dims(
    numbering: Numbering, parts: Sequence[PartitionEntry], files: ContentFiles, database: duckdb.DuckDBPyConnection
) -> dict[str, int]:
    """Return the dimensions of embeddings, by column.

    Raises:
        DataError: lists all columns that have no embedding or embeddings of several lengths.
    """
    source = f"read_parquet({file_list([numbering.store.file(part) for part in parts])})"
    found, faults = {}, []
    for name in files.embeddings:
        column = quoted(f"vector:{name}")
        lengths = database.execute(
            f"SELECT len({column}) AS length, count(*), first(key) FROM {source} WHERE {column} IS NOT NULL"
            " GROUP BY length ORDER BY count(*) DESC"
        ).fetchall()
        if len(lengths) == 1:
            found[name] = int(lengths[0][0])
        else:
            what = ", ".join(f"{count:,} of {length} numbers (such as of {key!r})" for length, count, key in lengths)
            faults.append(
                f"{numbering.entity}s: column {name!r}: embeddings must be of one length; there are {what or 'none'}"
            )
    if faults:
        raise DataError("\n".join(faults))
    return found


def entity_columns(entity: Entity, files: ContentFiles | None) -> list[str]:
    """Return the names of ingested content columns."""
    if files is None:
        return []
    text = ["text"] if files.text else []
    return [*text, *(f"value:{name}" for name in files.categoricals), *(f"vector:{name}" for name in files.embeddings)]
