"""The papers' tables: their configuration, their page, and a small run of the whole (marked long)."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidestack.infra.config import load_file, parse
from sidestack.infra.errors import ConfigError
from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.report.comparison import ArmResult, Comparison, Gain, IdTable, MetricResult, TaskResult
from sidestack.pipelines.studies.tables.__main__ import make_tables
from sidestack.pipelines.studies.tables.config import TableConfig
from sidestack.pipelines.studies.tables.page import as_page, as_text
from tests.components.golden import ROOT
from tests.pipelines.commands import run_command

FILE = ROOT / "configs/tables.yaml"


def task(gain: float | None) -> TaskResult:
    def over(value: float | None, spread: float) -> dict[str, Gain]:
        return {} if value is None else {"none": Gain(gain=value, interval=(value - spread, value + spread))}

    metrics = {
        "ne": MetricResult(value=0.7, over=over(gain, 0.001)),
        "auc": MetricResult(value=0.9123, over=over(None if gain is None else gain / 2, 0.0005)),
        "gauc": MetricResult(value=0.8, over=over(0.1, 0.01)),
    }
    return TaskResult(num=9, positives=3, metrics=metrics)


def arm(click: float | None, conversion: float | None, bytes_a_row: float, roi: float | None) -> ArmResult:
    tasks = {"click": task(click), "conversion": task(conversion)}
    return ArmResult.model_construct(tasks=tasks, feature_bytes_per_row=bytes_a_row, roi=roi)


USERS = IdTable(table="t_user_id", is_sid=False, possible_ids=9, distinct_ids=9, rows=9, collision_share=0.0, bytes=36)
HASHED = IdTable(
    table="t_item_sid", is_sid=True, possible_ids=729, distinct_ids=700, rows=50, collision_share=0.95, bytes=1600
)


def found() -> dict[str, Comparison]:
    arms = {
        "none": arm(0.0, 0.0, 0.0, None),
        "sid": arm(0.004, 0.0005, 12.0, 0.2).model_copy(update={"tables": (USERS, HASHED)}),
        "side": arm(0.006, None, 4.0, 1.0),
    }
    return {
        "t": Comparison.model_construct(
            tasks={"click": TaskSpec(), "conversion": TaskSpec(given="click")},
            confidence=0.95,
            arms=arms,
            reference="none",
            replicates=3,
            rows=1000,
            users=10,
            held_out=("2020-01-01", "2020-01-07"),
        )
    }


TABLES = {
    "t": TableConfig.model_validate({
        "title": "Table 9", "arms": ["none", "sid", "side"], "differs": "The data.",
        "paper": {"side": {"cost": 0.33, "gains": {"click": 0.0185}, "roi": 5.33}},
    })
}  # fmt: skip


Row = dict[str, list[str]]


def rows_of(page: str) -> dict[str, Row]:
    """Read a page's first table: arm -> title -> the cells below it, several where a title repeats."""
    lines = page.partition("Tables of SIDs:")[0].splitlines()
    grid = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    titles, *rows = grid
    found: dict[str, Row] = {}
    for row in rows:
        for title, cell in zip(titles, row, strict=True):
            found.setdefault(row[0], {}).setdefault(title, []).append(cell)
    return found


def test_page_shows_our_results_beside_the_papers() -> None:
    page = as_page(TABLES, found(), {"t": "abc"})
    assert "## Table 9" in page and "The data." in page and "`compare/abc`" in page
    assert "trained 3 times" in page
    assert "| sid | item_sid | 729 | 700 | 50 | 95.0% |  | 1.56 KiB |" in page and "user_id" not in page
    sid, side = (rows_of(page)[arm] for arm in ("sid", "side"))
    assert (sid["cost"], side["cost"]) == (["x1.00"], ["x0.33"])
    assert sid["click NE gain"] == ["+0.40 %"]
    assert sid["95 %"] == ["+0.30 to +0.50 %", "-0.05 to +0.15 %"]
    assert sid["conversion NE gain"] == ["+0.05 % ~"]  # its interval holds 0
    assert side["conversion NE gain"] == ["undefined"]
    assert side["RoI"] == ["x5.00"]
    assert [side[f"paper: {title}"] for title in ("cost", "click NE gain", "RoI")] == [
        ["x0.33"],
        ["+0.0185 %"],
        ["x5.33"],
    ]
    assert sid["paper: click NE gain"] == [""]
    assert not {"storage", "of dense", "click AUC"} & set(sid)  # no dense arm, another metric
    assert "AUC" not in page and "dense" not in page


def quantized(metric: str) -> tuple[TableConfig, Comparison]:
    """Return a table of a dense arm, which shows a gain on click only, and of two arms that quantize it."""
    arms = {
        "none": arm(0.0, 0.0, 0.0, None),
        "dense": arm(0.008, 0.0005, 1536.0, 0.1),
        "side": arm(0.006, 0.004, 6.0, 1.0),
        "hde": arm(-0.002, None, 1000.0, None),
    }
    table = TableConfig.model_validate({
        "title": "Second paper", "arms": list(arms), "differs": "The data.", "metric": metric,
        "storage_over": {"side": "dense", "hde": "dense"}, "paper": {"side": {"gain": 0.351, "storage": 30}},
    })  # fmt: skip
    return table, found()["t"].model_copy(update={"arms": arms})


@pytest.mark.parametrize(("metric", "click"), [("ne", "+0.60 %"), ("auc", "+0.30 %")])
def test_quantizing_arm_is_compared_with_the_dense_embeddings(metric: str, click: str) -> None:
    table, comparison = quantized(metric)
    page = as_page({"t": table}, {"t": comparison}, {"t": "abc"})
    dense, side, hde = (rows_of(page)[arm] for arm in ("dense", "side", "hde"))
    assert side[f"click {metric.upper()} gain"] == [click]
    assert [row["storage"] for row in (dense, side, hde)] == [[""], ["x256 smaller"], ["x1.5 smaller"]]
    # On conversion the dense arm shows no gain, so the others have no share of it.
    assert [row["of dense"] for row in (dense, side, hde)] == [["", ""], ["75 %", ""], ["-25 %", ""]]
    assert "`of dense`" in page


def test_share_of_a_harmful_dense_arm_is_left_empty() -> None:
    table, comparison = quantized("ne")
    arms = {**comparison.arms, "dense": arm(-0.008, -0.008, 1536.0, None)}
    page = as_page({"t": table}, {"t": comparison.model_copy(update={"arms": arms})}, {"t": "abc"})
    assert rows_of(page)["hde"]["of dense"] == ["", ""]


def test_table_in_auc_shows_auc_and_its_gain_beside_the_papers() -> None:
    table, comparison = quantized("auc")
    page = as_page({"t": table}, {"t": comparison}, {"t": "abc"})
    rows = rows_of(page)
    assert rows["none"]["click AUC gain"] == ["reference"]
    assert rows["none"]["conversion AUC"] == ["0.9123"]
    assert rows["side"]["95 %"] == ["+0.25 to +0.35 %", "+0.15 to +0.25 %"]
    assert rows["dense"]["conversion AUC gain"] == ["+0.03 % ~"]
    assert rows["hde"]["conversion AUC gain"] == ["undefined"]
    assert (rows["side"]["paper: AUC gain"], rows["side"]["paper: storage"]) == (["+0.351 %"], ["x30 smaller"])
    assert not {"click NE gain", "RoI", "paper: click NE gain"} & set(rows["side"])
    assert "AUC gain is AUC / AUC(reference) - 1, on held-out dates" in page
    assert "x256 smaller" in as_text({"t": table}, {"t": comparison})


def test_roi_of_gains_within_noise_is_marked() -> None:
    comparison = found()["t"]
    for name in ("sid", "side"):
        arms = {**comparison.arms, name: arm(0.0005, 0.0005, 4.0, 0.2)}
        page = as_page(TABLES, {"t": comparison.model_copy(update={"arms": arms})}, {"t": "abc"})
        assert rows_of(page)["side"]["RoI"] == ["x5.00 ~" if name == "sid" else "x1.00 ~"]


def test_terminal_text_is_aligned() -> None:
    lines = as_text(TABLES, found()).splitlines()
    assert lines[0] == "Table 9"
    assert len({len(line.rstrip()) for line in lines[1:2]} | {len(lines[1])}) == 1
    assert lines[1].index("RoI") + 3 == len(lines[1])


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("tables", {"arms", "table_3", "table_4", "table_5", "table_6", "levels", "dense_share"}),
        ("quantizing_intent", {"richness", "quantized"}),
        ("options", {"options"}),
    ],
)
def test_every_table_of_a_file_can_be_run(name: str, tables: set[str]) -> None:
    file = ROOT / f"configs/{name}.yaml"
    config = parse(PipelineConfig, load_file(file), file.name)
    assert set(config.tables) == tables
    used = {name for table in config.tables.values() for name in table.arms}
    assert used == set(config.ranker.arms)  # every arm is in a table


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"arms": ["none", "magic"]}, r"tables\.t\.arms: 'magic' is unknown"),
        ({"arms": ["side"]}, r"'none' must be one of the table's arms"),
        ({"arms": ["none"], "paper": {"side": {}}}, r"'side' must be one of the table's arms, none"),
        ({"arms": ["none"], "storage_over": {"none": "dense"}}, r"'dense' must be one of the table's arms, none"),
        ({"arms": ["none"], "metric": "calibration"}, r"'calibration' must be one that has a gain, ne, auc, gauc"),
    ],
)
def test_table_with_unknown_arms_or_metric_is_refused(table: dict[str, Any], message: str) -> None:
    values = {"run": {"name": "n"}, "tables": {"t": {"title": "T", "differs": "", **table}}}
    with pytest.raises(ConfigError, match=message):
        parse(PipelineConfig, values, "c.yaml")


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tables: 'table_9' is unknown; tables are arms, table_3"):
        make_tables(FILE, (), ["table_9"])


SMALL: dict[str, Any] = {
    "prepare": {
        "source": {"kind": "synthetic", "num_items": 400, "num_users": 80, "events_per_day": 400, "train_days": 3,
                   "test_days": 2},
    },
    "encoder": {
        "network": {"embedding_width": 16, "categorical_width": 8, "hidden": 32},
        "training": {"epochs": 1, "batch_size": 64, "codebook_starts": [0.0]},
    },
    "materialize": {"prefix_lengths": {"sid": [5, 10]}},
    "ranker": {
        "arm": "none", "training": {"batch_size": 128, "warmup_steps": 2},
        "arms": {"none": {}, "side": {"history": "side"}},
    },
    "tables": {
        "one": {"title": "One", "differs": "All.", "arms": ["none", "side"]},
        "two": {"title": "Two", "differs": "All.", "arms": ["side", "none"], "reference": "side"},
    },
}  # fmt: skip


@pytest.mark.long
def test_tables_of_several_trainings_share_their_common_stages(tmp_path: Path) -> None:
    launch = {stage: {"ranks": 1} for stage in ("prepare", "encoder", "materialize", "ranker")}
    run = {"name": "small", "runs_dir": f"{tmp_path}/runs", "launch": launch, "replicates": 2, "jobs": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SMALL, "run": run}))
    done = run_command("sidestack.pipelines.studies.tables", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page  {tmp_path}/runs/small/tables.md"
    started = [line for line in done.stderr.splitlines() if " starts with " in line]
    # prepare; two replicates of encoder, materialize and two arms; two comparisons
    assert len(started) == len(set(started)) + 1 == 1 + 2 * (1 + 1 + 2) + 2
    page = (tmp_path / "runs/small/tables.md").read_text()
    assert "## One" in page and "## Two" in page and "trained 2 times" in page
    saved = json.loads((tmp_path / "runs/small/tables.json").read_text())
    assert list(saved["two"]["arms"]) == ["side", "none"]
    assert len(saved["two"]["arms"]["none"]["tasks"]["click"]["metrics"]["ne"]["over"]["side"]["replicates"]) == 2
