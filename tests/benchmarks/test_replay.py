"""The replay benchmark: a growing log without future data, gains and costs computed by hand, and a quick run."""

import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidestack.benchmarks.items import ALONE
from sidestack.benchmarks.record import Row
from sidestack.benchmarks.replay.__main__ import main
from sidestack.benchmarks.replay.log import Sample, growing_log
from sidestack.benchmarks.replay.measures import ALL, gains, growth, summary
from sidestack.benchmarks.replay.page import verdict
from sidestack.benchmarks.replay.run import Span
from sidestack.infra.commit import committing
from sidestack.infra.errors import ConfigError
from sidestack.infra.impressions import all_columns, read_impressions
from sidestack.infra.snapshot import Dataset, read_dataset
from sidestack.infra.stage import StageRun
from sidestack.infra.tracking import RunLog
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.stage import prepare
from sidestack.pipelines.prepare.synthetic import Synthetic
from sidestack.pipelines.prepare.tables.source import Tables

SOURCE = Synthetic(
    kind="synthetic", num_items=60, num_users=40, events_per_day=60, train_days=8, test_days=4,
    impressions_per_request=3, embeddings={"text_embedding": 4}, categoricals={"category": 3},
)  # fmt: skip
DAYS = 4


def prepared(out: Path, source: Synthetic | Tables, as_of: date | None = None) -> Dataset:
    config = PrepareConfig(source=source, as_of=as_of, cache_dir=out / "cache")
    path = out / "prepare" / "key"
    with committing(path, ALONE, stage="prepare") as staging:
        log = RunLog.open(0, "prepare", staging, config.model_dump(mode="json"), {}, "", None)
        prepare(StageRun(config, {}, staging, ALONE, log))
    return read_dataset(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepared(tmp_path_factory.mktemp("whole"), SOURCE)


@pytest.fixture(scope="module")
def log(whole: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return growing_log(whole, tmp_path_factory.mktemp("log"), Sample(0.5, DAYS))


def rows_of(dataset: Dataset) -> pa.Table:
    return pa.concat_tables(read_impressions(dataset, all_columns(dataset)))


def texts(dataset: Dataset, ids: Any) -> Any:
    tables = [pq.read_table(file.path, columns=["text"]) for file in dataset.content_files("item")]
    return pa.concat_tables(tables)["text"].take(ids)


def test_log_has_the_rows_of_a_share_of_the_users_with_the_same_items(
    whole: Dataset, log: Path, tmp_path: Path
) -> None:
    dataset = prepared(tmp_path, Tables(kind="tables", path=log, test_days=DAYS))
    rows, before = rows_of(dataset), rows_of(whole)
    assert 0 < dataset.spec.num_users < whole.spec.num_users
    kept = before.filter(pa.array(np.isin(before["request_id"].to_numpy(), rows["request_id"].to_numpy())))
    for column in ("request_id", "event_time", "click", "conversion", "history_times"):
        assert rows[column].to_pylist() == kept[column].to_pylist()
    assert texts(dataset, rows["item_id"]).to_pylist() == texts(whole, kept["item_id"]).to_pylist()
    history, old = (table["history_item_ids"].combine_chunks().flatten() for table in (rows, kept))
    assert texts(dataset, history).to_pylist() == texts(whole, old).to_pylist()
    users = dict(zip(kept["user_id"].to_pylist(), rows["user_id"].to_pylist(), strict=True))
    assert len(set(users.values())) == len(users)


def test_each_period_has_only_the_items_known_by_its_end(log: Path, tmp_path: Path) -> None:
    sizes = []
    for periods in (1, 3):
        end = SOURCE.first_day + timedelta(days=DAYS * periods)
        source = Tables(kind="tables", path=log, test_days=1)
        dataset = prepared(tmp_path / str(periods), source, end)
        rows = rows_of(dataset)
        named = {*rows["item_id"].to_pylist(), *rows["history_item_ids"].combine_chunks().flatten().to_pylist()}
        assert named == set(range(dataset.spec.num_items)), "the dataset must have exactly the items that its rows name"
        sizes.append(dataset.spec.num_items)
    assert sizes[0] < sizes[1]


def test_label_is_null_until_it_matures(log: Path, tmp_path: Path) -> None:
    end = SOURCE.first_day + timedelta(days=DAYS)
    rows = rows_of(prepared(tmp_path, Tables(kind="tables", path=log, test_days=1), end))
    known = rows["conversion"].is_valid().to_numpy()
    mature = rows["event_time"].to_numpy().astype("datetime64[D]") < np.datetime64(end - timedelta(days=2))
    assert np.array_equal(known, mature)
    assert rows["click"].null_count == 0


def test_log_is_written_once(whole: Dataset, log: Path) -> None:
    before = (log / "manifest.json").stat().st_mtime_ns
    assert growing_log(whole, log.parent, Sample(0.5, DAYS)) == log
    assert (log / "manifest.json").stat().st_mtime_ns == before
    assert growing_log(whole, log.parent, Sample(0.4, DAYS)) != log


def test_cycles_end_with_complete_periods_of_the_log() -> None:
    dates = [date(2024, 1, 1) + timedelta(days=n) for n in range(44)]
    ends = Span(1.0, learned=2).as_ofs(dates, 7)
    assert [(end - dates[0]).days for end in ends] == [21, 28, 35, 42]
    assert Span(1.0, learned=2, cycles=1).as_ofs(dates, 7) == ends[:2]
    with pytest.raises(ConfigError, match="has 6 periods of 7 days; must have more than 6"):
        Span(1.0, learned=5).as_ofs(dates, 7)


def cycles(policy: str, click_ne: list[float], seconds: list[float]) -> Iterator[Row]:
    """Yield the first champion's cycle and one cycle for each NE, with 100 new rows each."""
    for number, (ne, cost) in enumerate(zip([0.0, *click_ne], [9.0, *seconds], strict=True), 1):
        yield {
            "policy": policy, "cycle": number, "newest": f"2024-01-{number:02d}", "promoted": True,
            "rows_learned": 100, "rows_log": 1000 + 100 * number, "cpu_seconds": {"judge": cost},
            "figures": {"champion_click_ne": ne, "sid_changed_share.sid.5": 0.1, "sid_changed_share.sid.15": 0.3},
        }  # fmt: skip


ROWS = [
    *cycles("append", [0.8, 0.72, 0.6, 0.54], [2.0, 2.1, 2.2, 2.3]),
    *cycles("never", [0.8, 0.8, 0.75, 0.6], [1.0] * 4),
]


def test_gains_are_relative_to_the_controls_ne_of_the_same_weeks() -> None:
    assert [*gains(ROWS, "append", "click").values()] == pytest.approx([0, 0.1, 0.2, 0.1])
    line = summary(ROWS, "append", 7)
    assert line["click_ne"] == pytest.approx(0.57)
    assert line["click_gain"] == pytest.approx(0.15)
    assert line["click_error"] == pytest.approx(0.05)
    assert line["conversion_ne"] is None and line["conversion_gain"] is None
    assert (line["sids_changed"], line["cpu_seconds"], line["bytes"]) == (0.3, pytest.approx(2.15), 7)


def test_growth_separates_costs_that_grow_with_the_log() -> None:
    (fit,) = [fit for fit in growth(ROWS, "append") if fit.stage == ALL]
    assert fit.a_row_log == pytest.approx(0.001)
    assert fit.share == pytest.approx(1 - 1.5 / 2.3)
    (flat,) = [fit for fit in growth(ROWS, "never") if fit.stage == ALL]
    assert flat.share == pytest.approx(1)


def test_verdict_follows_from_the_figures() -> None:
    lines = [summary(ROWS, policy, 7) for policy in ("append", "never")]
    fits = growth(ROWS, "append")
    words = verdict(lines, fits, "append")
    assert "By click NE `append` is best, +15.00 % ±5.00 over `never`." in words
    assert "Of the CPU seconds of the last cycle of `append`, 35% do not grow with the log." in words
    worse = [{**lines[0], "click_ne": 0.9}, lines[1]]
    assert "By click NE no policy is better than to train no more" in verdict(worse, fits, "append")
    third = {**lines[0], "policy": "rebuild", "click_ne": 0.8, "click_gain": -0.1}
    words = verdict([*lines, third], fits, "append")
    close = {**lines[0], "policy": "refresh", "click_ne": 0.5, "click_gain": 0.2, "cpu_seconds": 9.0}
    expected = "`append` within two standard errors of it; `append` costs least of these"
    assert expected in verdict([*lines, close], fits, "append")
    assert "`append` is best" in words and "`rebuild` is worse than `never` (-10.00 % ±5.00)" in words


@pytest.mark.long
def test_four_weeks_are_replayed_by_two_policies(tmp_path: Path) -> None:
    folders = [word for name in ("cache", "runs", "out") for word in (f"--{name}", str(tmp_path / name))]
    main(["--quick", *folders])
    rows = json.loads((tmp_path / "out" / "replay.json").read_text())["rows"]
    assert [(row["policy"], row["cycle"]) for row in rows] == [
        (policy, cycle) for policy in ("append", "never") for cycle in (1, 2, 3, 4)
    ]
    append, never = rows[:4], rows[4:]
    assert append[0] == {**never[0], "policy": "append"}, "the first champion is shared"
    assert append[1]["figures"]["champion_click_ne"] == never[1]["figures"]["champion_click_ne"]
    assert append[3]["figures"]["champion_click_ne"] != never[3]["figures"]["champion_click_ne"]
    assert append[0]["items"] < append[3]["items"]
    assert append[1]["rows_learned"] > 0 == never[1]["rows_learned"]
    assert {"prepare", "ranker-side", "judge"} <= append[1]["cpu_seconds"].keys()
    assert "ranker-side" not in never[1]["cpu_seconds"]
    page = (tmp_path / "out" / "replay.md").read_text()
    assert "| append |" in page and "does not grow" in page
    for picture in ("replay.png", "replay_cost.png"):
        assert picture in page and (tmp_path / "out" / picture).stat().st_size > 10_000
    main(["--quick", *folders])
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["rows"] == rows, (
        "completed cycles must not be repeated"
    )
