"""Sources in an object store: the same dataset as from a folder, also on a machine with an empty mirror."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import read_manifest, verify
from sidestack.infra.remote.urls import local_path, mirror
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines.join import main as join
from sidestack.pipelines.prepare.config import PrepareConfig
from tests.datasets import content
from tests.object_store import Bucket
from tests.pipelines.prepare.growing import add_day, day_at, tables_config, write_folder
from tests.pipelines.prepare.log.raw import log_config, write_log
from tests.pipelines.prepare.running import run_prepare


def prepared(out: Path, values: dict[str, Any], cache: Path) -> list[str]:
    """Prepare with an empty mirror, and return the identity of the source and the digest of the snapshot."""
    shutil.rmtree(mirror(), ignore_errors=True)
    values = {**values, "cache_dir": str(cache)}
    run_prepare(ALONE, values, out)
    return [parse(PrepareConfig, values, "test").data_identity(), read_manifest(out).digest]


@pytest.mark.slow
def test_tables_in_an_object_store_make_the_same_dataset_as_on_disk(bucket: Bucket, tmp_path: Path) -> None:
    own = write_folder(tmp_path / "own", 3)
    bucket.upload(own, "own")
    local = prepared(tmp_path / "runs/first", tables_config(own), tmp_path / "cache")
    url = f"{bucket.url}/own"
    assert prepared(tmp_path / "runs-2/first", at(url), tmp_path / "cache-2") == local
    assert prepared(local_path(f"{bucket.url}/runs/first"), at(url), tmp_path / "cache-3") == local
    add_day(own, day_at(3))
    bucket.upload(own, "own")
    before = set(bucket.keys("runs/store/"))
    grown = prepared(tmp_path / "runs/second", tables_config(own), tmp_path / "cache")
    assert prepared(local_path(f"{bucket.url}/runs/second"), at(url), tmp_path / "cache-4") == grown != local
    new = {key.split("/")[3] for key in set(bucket.keys("runs/store/")) - before if "/lists/" not in key}
    assert new == {f"date={day_at(3)}"}  # earlier dates are not made again
    shutil.rmtree(mirror())
    join(["--dataset", f"{bucket.url}/runs/second", "--out", f"{bucket.url}/joined"])
    joined = local_path(f"{bucket.url}/joined")
    shutil.rmtree(mirror())
    rows = sum(entry.rows for entry in verify(joined).files.values())
    assert rows == sum(entry.rows for entry in read_dataset(tmp_path / "runs/second").partitions("events"))


def at(url: str) -> dict[str, Any]:
    return {"source": {"kind": "tables", "path": url}}


@pytest.mark.slow
def test_raw_log_in_an_object_store_is_continued_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_log(log, 4)
    bucket.upload(log, "log")
    on_disk = log_config(log)
    at_url = replaced(on_disk, str(log), f"{bucket.url}/log")
    (first, _) = prepared(tmp_path / "runs/first", on_disk, tmp_path / "cache")
    assert prepared(local_path(f"{bucket.url}/runs/first"), at_url, tmp_path / "cache-2")[0] == first
    before = set(bucket.keys("runs/store/raw/events/"))
    write_log(log, 5)
    bucket.upload(log, "log")
    (second, _) = prepared(tmp_path / "runs/second", on_disk, tmp_path / "cache")
    assert prepared(local_path(f"{bucket.url}/runs/second"), at_url, tmp_path / "cache-3")[0] == second != first
    new = {key.split("/")[4] for key in set(bucket.keys("runs/store/raw/events/")) - before}
    assert len(new) == 1  # what was read before is not read again
    shutil.rmtree(mirror())
    found, expected = (
        read_dataset(path) for path in (local_path(f"{bucket.url}/runs/second"), tmp_path / "runs/second")
    )
    for table in ("events", "requests", "labels", "items"):
        assert content(found, table).equals(content(expected, table)), table


def replaced(values: Any, old: str, new: str) -> Any:
    if isinstance(values, dict):
        return {name: replaced(value, old, new) for name, value in values.items()}
    return values.replace(old, new) if isinstance(values, str) else values


def test_missing_source_is_named_with_its_url(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{bucket.url}/nothing: holds no file"):
        parse(PrepareConfig, at(f"{bucket.url}/nothing"), "test").data_identity()
