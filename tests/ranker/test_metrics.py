"""The metrics of a run: exact, equal to torchrec's, and with a reason where they are undefined."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.calibration import compute_calibration
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from sidestack.infra.parquet_writer import TableWriter
from sidestack.ranker.metrics import TrainingWindow, prediction_metrics, prediction_schema

TASKS = ("click", "conversion")
SCHEMA = prediction_schema(TASKS)


def write_predictions(
    path: Path, rank: int, click: list[int], conversion: list[int | None], p: list[float], user: int = 0
) -> None:
    """Write one rank's file; the row numbers of ranks do not overlap."""
    number = len(click)
    columns = {
        "row": range(1000 * rank, 1000 * rank + number), "user_id": [user] * number, "item_id": [0] * number,
        "event_time": [0] * number, "click": click, "conversion": conversion, "p_click": p, "p_conversion": p,
    }  # fmt: skip
    with TableWriter(path / f"predictions/part-{rank:05d}.parquet", SCHEMA) as writer:
        writer.write(pa.table([pa.array(values) for values in columns.values()], schema=SCHEMA))


def torchrec_metrics(labels: list[int], probabilities: list[float]) -> tuple[float, float, float]:
    """Return NE, AUC and calibration by torchrec's own functions, in float64."""
    y, p = torch.tensor([labels]).double(), torch.tensor([probabilities]).double()
    w = torch.ones_like(y)
    entropy = compute_cross_entropy(y, p, w, 1e-12).sum(-1)
    ne = compute_ne(entropy, w.sum(-1), y.sum(-1), (1 - y).sum(-1), 1e-12)
    auc = compute_auc(1, [p], [y], [w])
    return ne.item(), auc.item(), compute_calibration(p.sum(-1), y.sum(-1)).item()


def test_metrics_over_the_files_of_all_ranks_equal_those_of_torchrec(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    click = (rng.random(800) < 0.3).astype(int).tolist()
    conversion = [int(rng.random() < 0.5) if c and rng.random() < 0.8 else None for c in click]
    p = (rng.permutation(800) / 801 + 0.0005).astype(np.float32).tolist()
    write_predictions(tmp_path, 1, click[300:], conversion[300:], p[300:])
    write_predictions(tmp_path, 0, click[:300], conversion[:300], p[:300])
    measured = prediction_metrics(tmp_path, TASKS)
    known = [i for i, label in enumerate(conversion) if label is not None]
    expected = {
        "click": torchrec_metrics(click, p),
        "conversion": torchrec_metrics([conversion[i] for i in known], [p[i] for i in known]),
    }
    for task, values in expected.items():
        found = measured[task]
        assert (found["ne"], found["auc"], found["calibration"]) == pytest.approx(values, rel=1e-6)
    assert measured["conversion"]["num"] == len(known)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions"]  # the sort leaves no files


def test_gauc_orders_rows_within_each_user_across_files(tmp_path: Path) -> None:
    write_predictions(tmp_path, 0, [0, 1], [None, None], [0.8, 0.9], user=4)
    write_predictions(tmp_path, 1, [1, 0], [0, None], [0.1, 0.2], user=2)
    write_predictions(tmp_path, 2, [0, 0], [None, None], [0.7, 0.6], user=4)
    click, conversion = prediction_metrics(tmp_path, TASKS).values()
    assert (click["gauc"], click["gauc_users"], click["gauc_rows"]) == (pytest.approx((4 * 1.0 + 2 * 0.0) / 6), 2, 6)
    assert (conversion["gauc"], conversion["gauc_users"], conversion["gauc_rows"]) == (None, 0, 0)


@pytest.mark.parametrize(
    ("click", "reason"), [([0, 0], "none of the 2 click labels is positive"), ([1, 1], "labels is negative")]
)
def test_undefined_metric_has_a_reason(tmp_path: Path, click: list[int], reason: str) -> None:
    write_predictions(tmp_path, 0, click, [None, None], [0.5, 0.4])
    measured = prediction_metrics(tmp_path, TASKS)
    assert measured["click"]["ne"] is None
    assert measured["click"]["auc"] is None
    assert reason in measured["click"]["reason"]
    assert measured["conversion"]["reason"] == "no row has a complete conversion label"


def test_training_window_returns_mean_loss_and_ne_and_resets() -> None:
    window = TrainingWindow(TASKS)
    window.add(torch.tensor([[6.0, 0.0], [10.0, 0.0], [4.0, 0.0]]).double())
    window.add(torch.tensor([[4.0, 1.0], [10.0, 2.0], [6.0, 2.0]]).double())
    values = window.take()
    assert values["train_click_loss"] == pytest.approx(0.5)
    assert values["train_click_ne"] == pytest.approx(0.5 / math.log(2))
    assert math.isnan(values["train_conversion_ne"])  # only positives: not defined
    window.add(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]).double())
    assert window.take()["train_click_loss"] == pytest.approx(1.0)
