"""SID tables for other programs: each id once, with its key and its published SID."""

import json
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from sidestack.encoder.generation.sets import listed_set
from sidestack.encoder.sid.columns import sid_columns, with_sid_metadata
from sidestack.encoder.sid.spec import SidSpec
from sidestack.infra.errors import CommitError, DataError
from sidestack.infra.manifest import verify
from sidestack.infra.partitions import PartitionEntry
from sidestack.infra.snapshot import CONTENT, Snapshot, read_dataset, write_snapshot
from sidestack.infra.store import Store, in_order, write_part
from sidestack.infra.tables import DatasetSpec, Entity, content_schema
from sidestack.pipelines.join import main
from sidestack.pipelines.sid_tables import write_sid_tables
from tests.datasets import write_snapshot_of
from tests.infra.made_up import SPEC

LONG = {"quantizer": "structured", "levels": 3, "digits": 50, "depth": 25, "groups": 2, "fingerprint": "ab" * 32}
"""A SID of two columns."""


def write_made(path: Path, entity: Entity, parts: list[dict[int, int | None]], sids: SidSpec, has_keys: bool) -> Path:
    """Write a snapshot of items or users only, with their SIDs.

    Args:
        parts: for each part, id -> first chunk of its SID; the second chunk is one more. has_keys: whether ids have
            keys.
    """
    spec = SPEC.model_copy(update={"num_items": 5, "num_users": 5})
    store, listed, entries, first = Store(path / "store"), listed_set(sids), [], 0
    kept = listed.model_copy(update={"columns": {CONTENT[entity]: listed.columns[CONTENT[entity]]}})
    for number, part in enumerate(parts):
        entries.append(_part(store, spec, entity, number, first, list(part), has_keys))
        table = kept.table(sids.name, CONTENT[entity])
        entries.append(_sids(store, table, entries[-1], list(part.values()), sids))
        first += entries[-2].facts["new"]
    sets = {sids.name: kept}
    path.mkdir(exist_ok=True)
    write_snapshot(path, path, spec, Snapshot(store=str(store.path), sids=sets, partitions=tuple(in_order(entries))))
    return path


def _part(
    store: Store, spec: DatasetSpec, entity: Entity, number: int, first: int, ids: list[int], has_keys: bool
) -> PartitionEntry:
    schema = content_schema(spec, entity)
    rows = pa.Table.from_pylist([{f"{entity}_id": one} for one in ids], schema=schema)
    if has_keys:
        rows = rows.append_column(f"{entity}_key", pa.array([f"{entity} {one} of {number}" for one in ids]))
    return write_part(store, entity, number, f"key {number}", first, rows.schema, [rows])


def _sids(store: Store, table: str, base: PartitionEntry, values: list[int | None], sids: SidSpec) -> PartitionEntry:
    columns = sid_columns(sids.name, sids)
    with store.new_partition(table, base.slice, "key") as made:
        made.schema = pa.schema([with_sid_metadata(pa.field(name, pa.int64()), one) for name, one in columns.items()])
        with made.open_writer(base.files[0].name) as writer:
            chunks = [[None if one is None else one + chunk for one in values] for chunk in range(len(columns))]
            writer.write_group(pa.table(chunks, schema=made.schema))
    return store.entry(table, base.slice, "key")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Write a snapshot of items in three parts: the second revises two items of the first, the third only revises."""
    parts = [{0: 10, 1: None, 2: 30}, {0: 11, 2: 31, 3: 40, 4: 50}, {3: 41}]
    return write_made(tmp_path / "made", "item", parts, SidSpec.model_validate(LONG), has_keys=True)


def read(out: Path, name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = duckdb.sql(f"SELECT * FROM '{out / name}'").to_arrow_table().to_pylist()
    return found


def test_each_item_has_the_key_and_the_sid_of_its_first_part(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--dataset", str(made), "--out", str(tmp_path / "out"), "--sids"])
    verify(tmp_path / "out")
    assert capsys.readouterr().out == f"5 rows: {tmp_path}/out/sids/sid/items.parquet\n"
    parts = [0, 0, 0, 1, 1]
    assert read(tmp_path / "out", "sids/sid/items.parquet") == [
        {"item_id": i, "item_key": f"item {i} of {part}", "sid": sid, "sid_1": None if sid is None else sid + 1}
        for i, (part, sid) in enumerate(zip(parts, [10, None, 30, 40, 50], strict=True))
    ]
    metadata = json.loads((tmp_path / "out/sids/sid/sid.json").read_text())
    assert metadata["spec"]["fingerprint"] == "ab" * 32 and metadata["columns"]["sid_1"]["table"] == "items"


def test_users_without_keys_have_their_sids_and_no_key_column(tmp_path: Path) -> None:
    spec = SidSpec.model_validate({**LONG, "digits": 4, "depth": 2, "entity": "user", "name": "taste"})
    made = write_made(tmp_path / "made", "user", [{0: 7, 1: 8}, {2: 9, 3: None, 4: 1}], spec, has_keys=False)
    assert write_sid_tables(read_dataset(made), tmp_path / "out") == {"sids/taste/users.parquet": 5}
    found = read(tmp_path / "out", "sids/taste/users.parquet")
    assert found == [{"user_id": i, "taste": sid} for i, sid in enumerate([7, 8, 9, None, 1])]


@pytest.mark.parametrize("table", ["items", "sids/sid/*/items"])
def test_missing_partitions_are_refused_without_leftovers(made: Path, tmp_path: Path, table: str) -> None:
    (place,) = (made / "store").glob(f"{table}/part=00001/*")
    shutil.rmtree(place)
    with pytest.raises(CommitError, match="part=00001/.*: not a committed directory"):
        write_sid_tables(read_dataset(made), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_wrong_arguments_are_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="the snapshot has no SIDs; take the output of materialize"):
        write_sid_tables(read_dataset(write_snapshot_of(tmp_path / "bare", SPEC)), tmp_path / "out")
    for more in (["--columns", "sid"], ["--from", "2024-01-01"]):
        with pytest.raises(SystemExit, match="2"):
            main(["--dataset", str(made), "--out", str(tmp_path / "out"), "--sids", *more])
        assert "--from, --to and --columns are of the impressions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
