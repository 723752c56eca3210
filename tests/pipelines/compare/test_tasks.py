"""The comparison stage with other tasks, other metrics, and a task without positives."""

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.studies.tables.config import TableConfig
from sidestack.pipelines.studies.tables.page import as_page
from sidestack.ranker.metric_registry import Metric, all_metrics
from sidestack.ranker.metrics import prediction_metrics
from sidestack.ranker.statistics import RowTally
from tests.pipelines import fabricated
from tests.pipelines.compare.running import over_none, run_compare
from tests.pipelines.fabricated import predictions, ranker_output, truth
from tests.ranker.in_memory import task_metrics


def test_task_without_positives_is_reported_as_undefined(tmp_path: Path) -> None:
    drawn = truth()
    drawn["conversion"] = np.minimum(drawn["conversion"], 0)
    arms = {
        f"arm.{arm}.0": ranker_output(tmp_path / arm, arm, predictions(drawn, noise, 0))
        for arm, noise in fabricated.ARMS.items()
    }
    found = run_compare({**arms, **fabricated.other_inputs(tmp_path)}, tmp_path / "out", draw=True)
    for arm in found["arms"].values():
        conversion = arm["tasks"]["conversion"]
        assert conversion["positives"] == 0 and conversion["num"] > 0
        assert [one["value"] for one in conversion["metrics"].values()] == [None] * 4
        assert [one["over"] for one in conversion["metrics"].values()] == [{}] * 4
    for name in ("table.txt", "table.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "undefined (no positives)" in text
        assert "nan" not in re.sub('base64,[^"]*', "", text).lower()
    assert not (tmp_path / "out" / "figures" / "ne_gain_conversion.png").exists()


CHAIN = {"view": TaskSpec(), "basket": TaskSpec(given="view"), "order": TaskSpec(given="basket")}


@pytest.mark.parametrize(
    "tasks",
    [
        {"order": TaskSpec()},
        CHAIN,
        {"share": TaskSpec(given="like"), "like": TaskSpec(), "view": TaskSpec()},  # two roots, the child named first
    ],
    ids=["one", "chain", "two roots"],
)
def test_a_comparison_follows_the_tasks_of_the_dataset(tmp_path: Path, tasks: dict[str, TaskSpec]) -> None:
    found = run_compare(fabricated.inputs_of_tasks(tmp_path, tasks), tmp_path / "out", draw=True)
    root = next(name for name, task in tasks.items() if task.given is None)
    assert list(found["tasks"]) == list(tasks) and found["earlier_task"] == root
    for arm, noise in fabricated.ARMS.items():
        table = fabricated.table_of_tasks(tasks, noise, list(fabricated.ARMS).index(arm))
        assert list(found["arms"][arm]["tasks"]) == list(tasks)
        for task, result in found["arms"][arm]["tasks"].items():
            judged_rows = table.filter(table[task].is_valid())
            expected = task_metrics(judged_rows[task].to_numpy(), judged_rows[f"p_{task}"].to_numpy())
            assert (result["num"], result["positives"]) == (expected.num, expected.positives)
            assert result["metrics"]["ne"]["value"] == pytest.approx(expected.ne, rel=1e-12)
            assert result["metrics"]["auc"]["value"] == pytest.approx(expected.auc, rel=1e-12)
    text = (tmp_path / "out/table.txt").read_text()
    assert re.findall(r"^(\w+) +NE  ", text, re.MULTILINE) == list(tasks)
    rules = [len(line) for line in text.splitlines() if "─" in line]
    assert len(rules) == 3 + len(tasks) and len(set(rules[2:])) == 1  # below rates and training: results, one grid
    page, names = (
        (tmp_path / "out/report.html").read_text(),
        {path.stem for path in (tmp_path / "out/figures").iterdir()},
    )
    kinds = ("ne_gain_{}", "learning_{}", "cost_{}", "reliability_{}", "segments_{}_user", "segments_{}_item")
    assert names == {kind.format(task) for kind in kinds for task in tasks} | {"codebook_use"}
    assert f"rows with {root} = 1" in page and "click" not in re.sub('base64,[^"]*', "", page + text)


ACCURACY = Metric(
    "accuracy",
    "accuracy",
    partial(
        RowTally,
        value=lambda labels_M, scores_M: ((scores_M >= 0.5) == labels_M).astype(np.float64),
        scale=lambda num, positives: float(num) or None,
    ),
    better="higher",
    note="share of rows on the right side of one half",
)


def test_registered_metric_appears_in_all_outputs(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(all_metrics(), "accuracy", ACCURACY)
    found = run_compare(inputs, tmp_path / "out")
    drawn, values = truth(), {}
    for seed, (arm, noise) in enumerate(fabricated.ARMS.items()):
        table = predictions(drawn, noise, seed)
        values[arm] = np.mean((table["p_click"].to_numpy() >= 0.5) == drawn["click"])
        assert found["arms"][arm]["tasks"]["click"]["metrics"]["accuracy"]["value"] == pytest.approx(values[arm])
        assert prediction_metrics(inputs[f"arm.{arm}.0"], ("click",))["click"]["accuracy"] == pytest.approx(values[arm])
    gain = over_none(found, "side", "click", "accuracy")
    assert gain["gain"] == pytest.approx(values["side"] / values["none"] - 1)
    assert gain["interval"][0] < gain["gain"] < gain["interval"][1]
    text = (tmp_path / "out/table.txt").read_text()
    assert re.search(rf"^side .* {values['side']:.4f}$", text, re.MULTILINE)
    assert "accuracy: share of rows on the right side of one half" in text
    assert "accuracy gain" in (tmp_path / "out/table.md").read_text()
    assert "accuracy gain" in (tmp_path / "out/report.html").read_text()
    rows = {(row["arm"], row["task"]): row for row in csv.DictReader((tmp_path / "out/table.csv").open())}
    assert float(rows["side", "click"]["accuracy_gain_low"]) == gain["interval"][0]
    table = TableConfig.model_validate({"title": "T", "arms": [*fabricated.ARMS], "metric": "accuracy", "differs": ""})
    page = as_page({"t": table}, {"t": Comparison.read(tmp_path / "out")}, {"t": "abc"})
    assert "| click accuracy gain |" in page and "accuracy / accuracy(reference) - 1" in page
