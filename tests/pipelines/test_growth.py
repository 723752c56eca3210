"""A growing log in the driver: what is made when a day and a part of items are added, and what is kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.benchmarks.forked_launcher import ForkedLauncher
from sidestack.infra.config import plain
from sidestack.infra.partitions import LISTS, date_slice
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.pipelines.config import read_config
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.graph import stages
from sidestack.pipelines.run import run_stages
from tests.components.golden import ROOT
from tests.datasets import content
from tests.pipelines.own_log import OwnLog

CONFIG: dict[str, Any] = {
    "encoder": {"training": {"epochs": 1, "batch_size": 32, "lanes": 2}},
    "materialize": {"prefix_lengths": {"sid": [5, 10, 15]}},
    "run": {
        "name": "own",
        "replicates": 1,
        "launch": {name: {"ranks": 1, "cpu": 1} for name in ("prepare", "encoder", "materialize")},
    },
}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("sidestack.pipelines.run.launcher_of", lambda run: ForkedLauncher())
    monkeypatch.chdir(ROOT)
    yield tmp_path


def materialized(base: Path, log: OwnLog, *overrides: str) -> Dataset:
    """Run prepare, encoder and materialize, each forked and through its own main program; open the dataset."""
    prepare = {"source": {"kind": "tables", "path": str(log.path), "test_days": 1}, "cache_dir": str(base / "cache")}
    values = {**CONFIG, "prepare": prepare, "run": {**CONFIG["run"], "runs_dir": str(base / "runs")}}
    (base / "run.yaml").write_text(yaml.safe_dump(values))
    read, config = read_config(base / "run.yaml", overrides)
    plan = [stage for stage in stages(config) if stage.name in ("prepare", "encoder", "materialize")]
    return read_dataset(run_stages(plan, config.run, read, plain(config)))


def stored(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Return the size and time of change of every file in the store."""
    files = (path for path in dataset.store.rglob("*") if path.is_file())
    return {str(path.relative_to(dataset.store)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.whole
def test_only_the_added_day_and_part_are_made_and_another_encoder_makes_only_sids(base: Path) -> None:
    log = OwnLog(base / "own", days=4, items=200)
    before = materialized(base, log)
    files, sids = stored(before), content(before, before.snapshot.sids["sid"].table("sid", "items"))["sid"].to_pylist()
    runs = base / "runs/own"
    assert runs == run_dir(read_config(base / "run.yaml", ())[1].run)
    (encoder,) = (path for path in (runs / "encoder").iterdir() if path.suffix == "")

    assert materialized(base, log) == before  # nothing new: the same snapshot
    assert stored(before) == files

    log.add_items(30)
    day = log.add_day()
    after = materialized(base, log, f"run.encoders={{sid: {encoder}}}")
    assert [path for path in (runs / "encoder").iterdir() if path.suffix == ""] == [encoder]
    new = {name: size for name, (size, _) in stored(after).items() if name not in files}
    assert {name: stored(after)[name] for name in files} == files
    generation = after.snapshot.sids["sid"].generation
    lists = {name for name in new if name.startswith(LISTS)}
    assert len(lists) == 7  # one for each table below: of a month of dates, or of a hundred parts
    assert {name.rsplit("/", 2)[0] for name in new.keys() - lists} == {
        f"{table}/{date_slice(day)}"
        for table in (
            "requests",
            "events",
            "labels",
            f"sids/sid/{generation}/events",
            f"sids/sid/{generation}/requests",
        )
    } | {"items/part=00001", f"sids/sid/{generation}/items/part=00001"}
    assert content(after, after.snapshot.sids["sid"].table("sid", "items"))["sid"].to_pylist()[:200] == sids
    assert after.spec.num_items == 230
    assert after.spec.test == (day, day)
    # The fifth day takes about a fourth of the bytes of the first four.
    daily = sum(size for name, (size, _) in files.items() if "/date=" in name)
    assert sum(size for name, size in new.items() if "/date=" in name) < 0.3 * daily

    made = stored(after)
    other = materialized(base, log, "encoder.training.seed=1")
    made_now = {name for name in stored(other) if name not in made and not name.startswith(LISTS)}
    (name,) = {name.split("/")[2] for name in made_now}
    assert {name.split("/")[0] for name in made_now} == {"sids"}
    assert name == other.snapshot.sids["sid"].generation != generation
    assert {name: stored(other)[name] for name in made} == made
