"""The metrics, gains and intervals of the comparison stage against direct computations."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sidestack.ranker.statistics import log_loss
from tests.pipelines import fabricated
from tests.pipelines.compare.running import altered, judged, over_none, run_compare, with_column
from tests.pipelines.fabricated import predictions, ranker_output, truth
from tests.ranker.in_memory import auc_by_user, task_metrics


def test_metrics_match_the_predictions(comparison: dict[str, Any]) -> None:
    drawn = truth()
    tables = {arm: predictions(drawn, noise, seed) for seed, (arm, noise) in enumerate(fabricated.ARMS.items())}
    for task in ("click", "conversion"):
        measured = {arm: task_metrics(*judged(drawn, table, task)[:2]) for arm, table in tables.items()}
        for arm, metrics in measured.items():
            found = comparison["arms"][arm]["tasks"][task]
            assert (found["num"], found["positives"]) == (metrics.num, metrics.positives)
            values = {name: one["value"] for name, one in found["metrics"].items()}
            assert values["ne"] == pytest.approx(metrics.ne, rel=1e-12)
            assert values["auc"] == pytest.approx(metrics.auc, rel=1e-12)
            assert values["calibration"] == pytest.approx(metrics.calibration, rel=1e-12)
            if arm != "none":
                gain = found["metrics"]["ne"]["over"]["none"]["gain"]
                assert gain == pytest.approx(1 - values["ne"] / measured["none"].ne, abs=1e-12)


def test_intervals_match_a_plain_paired_bootstrap_over_users(comparison: dict[str, Any]) -> None:
    drawn = truth()
    users_N = drawn["user_id"]
    losses = [
        log_loss(drawn["click"], predictions(drawn, fabricated.ARMS[arm], seed)["p_click"].to_numpy())
        for seed, arm in ((0, "none"), (2, "side"))
    ]
    by_user = [[loss[users_N == user].sum() for user in np.unique(users_N)] for loss in losses]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        drawn_users = rng.integers(0, len(by_user[0]), len(by_user[0]))
        gains.append(1 - np.sum(np.array(by_user[1])[drawn_users]) / np.sum(np.array(by_user[0])[drawn_users]))
    found = over_none(comparison, "side", "click", "ne")["interval"]
    assert found == pytest.approx(np.quantile(gains, [0.025, 0.975], method="hazen").tolist(), abs=1e-9)


def test_gauc_and_deciles_match_the_predictions(comparison: dict[str, Any]) -> None:
    drawn = truth()
    for seed, (arm, noise) in enumerate(fabricated.ARMS.items()):
        labels, scores, users = judged(drawn, predictions(drawn, noise, seed), "conversion")
        found = comparison["arms"][arm]["tasks"]["conversion"]
        expected = auc_by_user(users, labels, scores)
        gauc = found["metrics"]["gauc"]
        assert gauc["value"] == pytest.approx(expected.gauc)
        assert gauc["counts"] == {"users": len(expected.users_V), "rows": expected.rows_V.sum()}
        assert [one["rows"] for one in found["deciles"]] == [len(part) for part in np.array_split(labels, 10)]
        assert [one["predicted"] for one in found["deciles"]] == sorted(one["predicted"] for one in found["deciles"])
        assert sum(one["observed"] * one["rows"] for one in found["deciles"]) == pytest.approx(labels.sum())


def test_gauc_gain_is_relative_with_an_interval_over_users(comparison: dict[str, Any]) -> None:
    side, none = (comparison["arms"][arm]["tasks"]["click"]["metrics"]["gauc"] for arm in ("side", "none"))
    gain = side["over"]["none"]
    assert gain["gain"] == pytest.approx(side["value"] / none["value"] - 1)
    assert 0 < gain["interval"][0] < gain["gain"] < gain["interval"][1]
    assert "none" not in none["over"] and gain["seeds"] is None
    drawn = truth()
    users, aucs = None, []
    for seed, arm in ((2, "side"), (0, "none")):
        labels, scores, of_rows = judged(drawn, predictions(drawn, fabricated.ARMS[arm], seed), "click")
        found = auc_by_user(of_rows, labels, scores)
        users = np.zeros(len(np.unique(of_rows)))
        users[np.searchsorted(np.unique(of_rows), found.users_V)] = found.auc_V * found.rows_V
        aucs.append(users)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(aucs[0]), len(aucs[0])) for _ in range(200)]
    gains = [aucs[0][drawn_users].sum() / aucs[1][drawn_users].sum() - 1 for drawn_users in draws]
    assert gain["interval"] == pytest.approx(np.quantile(gains, [0.025, 0.975], method="hazen").tolist(), abs=1e-9)


def test_auc_gain_is_relative_with_the_interval_of_a_bootstrap_over_users(comparison: dict[str, Any]) -> None:
    side, none = (comparison["arms"][arm]["tasks"]["click"]["metrics"]["auc"] for arm in ("side", "none"))
    gain = side["over"]["none"]
    assert gain["gain"] == pytest.approx(side["value"] / none["value"] - 1)
    assert "none" not in none["over"] and gain["seeds"] is None
    drawn = truth()
    users_N, labels_N = drawn["user_id"], drawn["click"]
    scores = {
        arm: predictions(drawn, fabricated.ARMS[arm], seed)["p_click"].to_numpy()
        for seed, arm in ((0, "none"), (2, "side"))
    }
    rows_of = [np.flatnonzero(users_N == user) for user in np.unique(users_N)]
    rng = np.random.default_rng(0)
    gains = []
    for _ in range(200):
        rows = np.concatenate([rows_of[user] for user in rng.integers(0, len(rows_of), len(rows_of))])
        aucs = {arm: task_metrics(labels_N[rows], of_arm[rows]).auc for arm, of_arm in scores.items()}
        assert aucs["side"] and aucs["none"]
        gains.append(aucs["side"] / aucs["none"] - 1)
    # Equal to first order for the same resamples: the bounds differ by a small part of the interval's width.
    low, high = np.quantile(gains, [0.025, 0.975], method="hazen")
    assert gain["interval"] == pytest.approx([low, high], abs=0.03 * (high - low))


def slow_segment(clicks: int) -> str:
    return "0" if clicks == 0 else "1-2" if clicks < 3 else "3-9" if clicks < 10 else "10+"


@pytest.mark.parametrize("kind", ["user", "item"])
def test_segments_group_rows_by_the_positives_of_the_training_dates(comparison: dict[str, Any], kind: str) -> None:
    earlier = pa.concat_tables([fabricated.training_events(0), fabricated.training_events(1)])
    clicks = Counter(earlier.filter(pc.equal(earlier["click"], 1))[f"{kind}_id"].to_pylist())
    drawn = truth()
    losses = {
        arm: log_loss(drawn["click"], predictions(drawn, noise, seed)["p_click"].to_numpy())
        for seed, (arm, noise) in enumerate(fabricated.ARMS.items())
    }
    place = np.array([slow_segment(clicks[number]) for number in drawn[f"{kind}_id"].tolist()])
    found = comparison["arms"]["side"]["tasks"]["click"]["segments"][kind]
    assert [one["name"] for one in found] == ["0", "1-2", "3-9", "10+"]
    assert sum(one["rows"] > 0 for one in found) >= 3
    for one in found:
        inside = place == one["name"]
        assert one["rows"] == inside.sum() and one["positives"] == drawn["click"][inside].sum()
        assert one["users"] == len(np.unique(drawn["user_id"][inside]))
        if one["gain"]:
            expected = 1 - losses["side"][inside].sum() / losses["none"][inside].sum()
            assert one["gain"]["gain"] == pytest.approx(expected)
            assert one["gain"]["interval"][0] < expected < one["gain"]["interval"][1]
    reference = comparison["arms"]["none"]["tasks"]["click"]["segments"][kind]
    assert [one["gain"] for one in reference] == [None] * 4


def test_side_is_better_and_the_reference_has_no_gain(comparison: dict[str, Any]) -> None:
    arms = {arm: values["tasks"]["click"]["metrics"]["ne"] for arm, values in comparison["arms"].items()}
    assert set(arms["none"]["over"]) == {"sid_ngram", "side"}
    assert arms["side"]["over"]["none"]["interval"][0] > 0
    over = arms["side"]["over"]["sid_ngram"]
    assert over["gain"] == pytest.approx(1 - arms["side"]["value"] / arms["sid_ngram"]["value"])


def test_the_number_of_ranks_that_wrote_predictions_does_not_matter(
    inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path
) -> None:
    arms = {
        f"arm.{arm}.0": ranker_output(tmp_path / arm, arm, predictions(truth(), noise, seed), ranks=seed + 1)
        for seed, (arm, noise) in enumerate(fabricated.ARMS.items())
    }
    again = run_compare({**inputs, **arms}, tmp_path / "out")
    assert again["arms"] == comparison["arms"]


def test_rows_without_a_label_do_not_count(inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path) -> None:
    def unlabelled_to_zero(table: pa.Table) -> pa.Table:
        scores = np.where(truth()["conversion"] >= 0, table["p_conversion"].to_numpy(), 0.0)
        return with_column(table, "p_conversion", pa.array(scores, pa.float32()))

    moved = {**inputs, "arm.side.0": altered(tmp_path / "side", unlabelled_to_zero)}
    again = run_compare(moved, tmp_path / "out")
    assert again["arms"]["side"]["tasks"] == comparison["arms"]["side"]["tasks"]


def test_another_reference_reverses_the_gains(
    inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path
) -> None:
    found = run_compare(inputs, tmp_path / "out", reference="side")
    assert list(found["arms"]) == ["side", "none", "sid_ngram"]
    assert found["arms"]["none"]["tasks"]["click"]["metrics"]["ne"]["over"]["side"]["gain"] < 0
    assert found["config_digest"] != comparison["config_digest"]


def test_order_of_the_rows_does_not_matter(inputs: dict[str, Path], comparison: dict[str, Any], tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(4000)
    same = {**inputs, "arm.side.0": altered(tmp_path / "side", lambda table: table.take(pa.array(shuffled)))}
    assert run_compare(same, tmp_path / "out")["arms"] == comparison["arms"]
