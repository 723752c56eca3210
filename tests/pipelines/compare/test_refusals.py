"""Inputs that the comparison stage refuses or warns about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sidestack.infra.errors import DataError
from tests.pipelines import fabricated
from tests.pipelines.compare.running import altered, one_value, run_compare
from tests.pipelines.fabricated import predictions, ranker_output, truth


def test_an_id_outside_the_dataset_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = one_value("item_id", 7, 50)(predictions(truth(), 0.9, 0))
    odd = ranker_output(tmp_path / "none", "none", table)
    with pytest.raises(DataError, match=r"item_id 50 is outside the dataset's table \[0, 50\)"):
        run_compare({**inputs, "arm.none.0": odd}, tmp_path / "out")


def test_arms_of_different_dates_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    dates = {"train": ["2017-09-10", "2017-11-04"], "held_out": ["2017-11-12", "2017-12-09"]}
    odd = ranker_output(tmp_path / "side", "side", predictions(truth(), 0.5, 0), summary={"dates": dates})
    with pytest.raises(DataError, match=r"different dates \(.*; side: 2017-09-10 to 2017-11-04\)"):
        run_compare({**inputs, "arm.side.0": odd}, tmp_path / "out")


def test_differences_other_than_the_arm_give_warnings(inputs: dict[str, Path], tmp_path: Path, capfd: Any) -> None:
    table = predictions(truth(), 0.5, 0)
    odd = ranker_output(tmp_path / "side", "side", table, summary={"world_size": 8}, dataset="another")
    found = run_compare({**inputs, "arm.side.0": odd}, tmp_path / "out")
    assert "different numbers of ranks (none 2, sid_ngram 2, side 8)" in found["warnings"][0]
    assert "arm side was trained on another dataset" in found["warnings"][1]
    shown = capfd.readouterr().out
    assert all(warning in shown for warning in found["warnings"][:1])


CLICKED = int(np.flatnonzero(truth()["click"] == 1)[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), r"cannot be paired: 3,999 predicted rows against 4,000"),
        (one_value("click", CLICKED, 0), rf"row {CLICKED} has click 0 against 1"),
        (one_value("conversion", CLICKED, None), rf"row {CLICKED} has conversion null against [01]"),
        (one_value("user_id", 7, 399_999), r"row 7 has user_id 399999 against \d+"),
        (one_value("row", 7, 4000), r"row 7 has row 8 against 7"),
        (one_value("row", 7, 8), r"row 8 was predicted more than once"),
        (one_value("click", 7, 2), r"row group 0: column 'click' holds 2; must be 0, 1 or null"),
        (one_value("p_click", 7, 1.5), r"row group 0: column 'p_click' holds 1.5; must be a probability"),
        (one_value("p_click", 7, float("nan")), r"column 'p_click' holds nan; must be a probability"),
        (one_value("p_click", 7, None), r"column 'p_click' has 1 nulls; none may be"),
        (lambda table: table.drop_columns(["p_conversion"]), r"column 'p_conversion' is missing"),
        (lambda table: table.slice(0, 0), r"predictions: holds no row"),
    ],
)
def test_predictions_that_cannot_be_paired_are_refused(
    inputs: dict[str, Path], tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    bad = {**inputs, "arm.side.0": altered(tmp_path / "side", change)}
    with pytest.raises(DataError, match=message):
        run_compare(bad, tmp_path / "out")
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_rows_that_were_read_and_not_predicted_are_detected(inputs: dict[str, Path], tmp_path: Path) -> None:
    table = predictions(truth(), 0.45, 2)
    for read in (4000, 4001):
        path = ranker_output(tmp_path / f"{read}", "side", table, summary={"held_out_rows": read})
        given = {**inputs, "arm.side.0": path}
        if read == 4000:
            run_compare(given, tmp_path / "out")
            continue
        with pytest.raises(DataError, match=r"arm.side.0: 4,000 rows are predicted, .* says that 4,001 were read"):
            run_compare(given, tmp_path / "odd")


def test_a_dataset_without_tasks_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    dataset = fabricated.dataset_output(tmp_path / "dataset", {})
    with pytest.raises(DataError, match="dataset.json names no tasks"):
        run_compare({**inputs, "dataset": dataset}, tmp_path / "out")


def test_inputs_that_are_not_valid_arms_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    without = {name: path for name, path in inputs.items() if name != "arm.none.0"}
    with pytest.raises(DataError, match=r"reference='none': must be one of the arms given \(sid_ngram, side\)"):
        run_compare(without, tmp_path / "a")
    with pytest.raises(DataError, match="holds the arm 'sid_ngram', was given as arm.side.0"):
        run_compare({**inputs, "arm.side.0": inputs["arm.sid_ngram.0"]}, tmp_path / "b")
    with pytest.raises(DataError, match="summary.json: not a ranker's summary: arm: Field required"):
        run_compare({**inputs, "arm.side.0": inputs["encoder.sid"]}, tmp_path / "c")
    with pytest.raises(DataError, match="predictions: holds no Parquet file"):
        bare = ranker_output(tmp_path / "bare", "side", predictions(truth(), 0.5, 0), ranks=0)
        run_compare({**inputs, "arm.side.0": bare}, tmp_path / "d")
