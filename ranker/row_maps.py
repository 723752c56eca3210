"""The rows of ids on disk, for tables with admission (`ranker.admission`), beside the weights of the tables.

Nothing here needs torchrec: a served ranker reads its maps with this module.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidestack.infra.errors import DataError
from sidestack.infra.tensors import write_tensors
from sidestack.ranker.admission import IdRows, Rows
from sidestack.ranker.features import ArmFeatures

MAPS_FILE = "admission.safetensors"
_ROWS, _COUNTS, _LAST_SEEN, _COUNTED_TO = "rows", "counts", "last_seen", "counted_to"


def with_row_maps(features: ArmFeatures, folder: Path) -> ArmFeatures:
    """Return features whose tables with admission have their row maps, read from a folder.

    Raises:
        DataError: the file cannot be read.
    """
    maps = read_row_maps(folder, [one.column for one in features.tables if one.has_admission])
    return features.with_tables(lambda one: replace(one, row_map=maps.get(one.column)))


def read_row_maps(folder: Path, columns: Iterable[str]) -> dict[str, Rows]:
    """Return the row of each id, by column, memory-mapped.

    Raises:
        DataError: the file cannot be read.
    """
    return {column: found.numpy() for column, found in _read(folder, columns, _ROWS).items()}


def write_row_maps(maps: Mapping[str, Rows], folder: Path) -> None:
    """Write only the maps, for a served ranker, which counts nothing; without maps no file is written.

    Raises:
        OSError: the file cannot be written.
    """
    if maps:
        _write({_key(column, _ROWS): torch.from_numpy(row_I) for column, row_I in maps.items()}, folder)


def read_id_rows(folder: Path, columns: Iterable[str]) -> dict[str, IdRows]:
    """Return the rows of ids with their counts and dates, by column, as writable copies.

    Raises:
        DataError: the file cannot be read.
    """
    columns = list(columns)
    parts = (_ROWS, _COUNTS, _LAST_SEEN, _COUNTED_TO)
    rows, counts, last_seen, counted_to = (_read(folder, columns, part) for part in parts)
    return {
        column: IdRows(
            rows[column].numpy().copy(),
            counts[column].numpy().copy(),
            last_seen[column].numpy().copy(),
            int(counted_to[column]),
        )
        for column in columns
    }


def write_id_rows(known: Mapping[str, IdRows], folder: Path) -> None:
    """Write the rows of ids with their counts and dates, by column.

    Raises:
        OSError: the file cannot be written.
    """
    named: dict[str, Tensor] = {}
    for column, ids in known.items():
        parts = {_ROWS: ids.row_I, _COUNTS: ids.count_I, _LAST_SEEN: ids.last_seen_I}
        named |= {_key(column, part): torch.from_numpy(values_I) for part, values_I in parts.items()}
        named[_key(column, _COUNTED_TO)] = torch.tensor(ids.counted_to)
    _write(named, folder)


def _read(folder: Path, columns: Iterable[str], part: str) -> dict[str, Tensor]:
    names = {column: _key(column, part) for column in columns}
    if not names:
        return {}
    file = folder / MAPS_FILE
    try:
        with safe_open(file, "pt") as tensors:
            return {column: tensors.get_tensor(name) for column, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: the rows of ids cannot be read: {error}") from error


def _write(named: Mapping[str, Tensor], folder: Path) -> None:
    write_tensors(named, folder / MAPS_FILE)


def _key(column: str, part: str) -> str:
    return f"{column}/{part}"
