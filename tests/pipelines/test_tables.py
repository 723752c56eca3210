"""The papers' tables: what they are run from, what their page says, and, slowly, a small form of the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import load_file, parse
from infra.errors import ConfigError
from pipelines.config import PipelineConfig
from pipelines.report.comparison import ArmResult, Comparison, TaskResult
from pipelines.tables.__main__ import make_tables
from pipelines.tables.config import TableConfig
from pipelines.tables.page import as_page, as_text
from tests.components.golden import ROOT
from tests.pipelines.commands import run_command

FILE = ROOT / "configs/tables.yaml"


def task(gain: float | None, spread: float = 0.001) -> TaskResult:
    bounds = None if gain is None else (gain - spread, gain + spread)
    return TaskResult(
        num=9, positives=3, ne=0.7, ne_gain=gain, ne_gain_interval=bounds, auc=None, calibration=None, over={}
    )


def arm(click: float | None, conversion: float | None, bytes_a_row: float, roi: float | None) -> ArmResult:
    tasks = {"click": task(click), "conversion": task(conversion)}
    return ArmResult.model_construct(tasks=tasks, feature_bytes_per_row=bytes_a_row, roi=roi)


def found() -> dict[str, Comparison]:
    arms = {
        "none": arm(0.0, 0.0, 0.0, None),
        "sid": arm(0.004, 0.0005, 12.0, 0.2),
        "side": arm(0.006, None, 4.0, 1.0),
    }
    return {
        "t": Comparison.model_construct(
            arms=arms, reference="none", replicates=3, rows=1000, users=10, held_out=("2020-01-01", "2020-01-07")
        )
    }


TABLES = {
    "t": TableConfig.model_validate({
        "title": "Table 9", "arms": ["none", "sid", "side"], "differs": "The data.",
        "paper": {"side": {"cost": 0.33, "click": 0.0185, "roi": 5.33}},
    })
}  # fmt: skip


def test_page_has_ours_beside_the_papers() -> None:
    page = as_page(TABLES, found(), {"t": "abc"})
    assert "## Table 9" in page and "The data." in page and "`compare/abc`" in page
    assert "trained 3 times" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| s")]
    titles = next(
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "bytes a row |" in line
    )
    sid, side = (dict(zip(titles, row, strict=True)) for row in rows)
    assert (sid["cost"], side["cost"]) == ("x1.00", "x0.33")
    assert sid["click NE gain"] == "+0.40 %"
    assert sid["conversion NE gain"] == "+0.05 % ~"  # its interval holds 0
    assert side["conversion NE gain"] == "undefined"
    assert side["RoI"] == "x5.00"
    assert (side["paper: cost"], side["paper: click NE gain"], side["paper: RoI"]) == ("x0.33", "+0.0185 %", "x5.33")
    assert sid["paper: click NE gain"] == ""


def test_terminal_text_is_aligned() -> None:
    lines = as_text(TABLES, found()).splitlines()
    assert lines[0] == "Table 9"
    assert len({len(line.rstrip()) for line in lines[1:2]} | {len(lines[1])}) == 1
    assert lines[1].index("RoI") + 3 == len(lines[1])


def test_every_table_of_the_file_can_be_run() -> None:
    config = parse(PipelineConfig, load_file(FILE), FILE.name)
    assert {"table_3", "table_4", "table_5", "table_6", "levels"} <= set(config.tables)
    used = {name for table in config.tables.values() for name in table.arms}
    assert used == set(config.ranker.arms)  # no arm that no table holds against another


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"arms": ["none", "magic"]}, r"tables\.t\.arms: 'magic' is unknown"),
        ({"arms": ["side"]}, r"'none' must be one of the table's arms"),
        ({"arms": ["none"], "paper": {"side": {}}}, r"'side' must be one of the table's arms, none"),
    ],
)
def test_a_table_of_what_is_not_there_is_refused(table: dict[str, Any], message: str) -> None:
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


@pytest.mark.slow
def test_tables_of_several_trainings_share_what_they_have_in_common(tmp_path: Path) -> None:
    launch = {stage: {"ranks": 1} for stage in ("prepare", "encoder", "materialize", "ranker")}
    run = {"name": "small", "runs_dir": f"{tmp_path}/runs", "launch": launch, "replicates": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**SMALL, "run": run}))
    done = run_command("pipelines.tables", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page  {tmp_path}/runs/small/tables.md"
    started = [line for line in done.stderr.splitlines() if " starts with " in line]
    # prepare; two replicates of encoder, materialize and two arms; two comparisons
    assert len(started) == len(set(started)) + 1 == 1 + 2 * (1 + 1 + 2) + 2
    page = (tmp_path / "runs/small/tables.md").read_text()
    assert "## One" in page and "## Two" in page and "trained 2 times" in page
    told = json.loads((tmp_path / "runs/small/tables.json").read_text())
    assert list(told["two"]["arms"]) == ["side", "none"]
    assert len(told["two"]["arms"]["none"]["tasks"]["click"]["over"]["side"]["ne_gain_replicates"]) == 2
