"""The quantizer benchmark's table, goals and figures, computed from results."""

from pathlib import Path
from typing import Any

import pytest

from sidestack.benchmarks.quantizers import figures
from sidestack.benchmarks.quantizers.corpora import Corpus
from sidestack.benchmarks.quantizers.table import REFERENCE, combined, goals_of, rows_of, table_rows
from sidestack.benchmarks.quantizers.work import Outcome, Task
from sidestack.benchmarks.record import markdown_table

CORPUS = Corpus("text", Path("nowhere"))


def result(loss: float, validation: float | None = None, side: bool = False) -> dict[str, Any]:
    recall = {"20": 1 - loss, "50": 0.9, "100": 1.0}
    return {
        "seconds": 2.0,
        "digits": 3,
        "radix": 256,
        "real_bits": 24.0,
        "cosine_loss": loss,
        "validation_loss": loss if validation is None else validation,
        "mse": 2 * loss,
        "mse_as_decoded": None,
        "recall": recall,
        "recall_side": recall if side else None,
        "recall_side_steps": None,
        "prefix_losses": {"1": 0.9, "3": loss},
        "use": {"entropy_bits": [8.0, 6.0, 4.0], "perplexity": [256.0, 64.0, 16.0], "dead_levels": [0, 1, 2]},
        "unique_share": 0.5,
        "encoded_per_second": 1000.0,
    }


def outcome(method: str, seed: int, result: dict[str, Any] | None, bits: int = 24) -> Outcome:
    return Outcome(Task(CORPUS, method, bits, seed, Path("x.yaml")), result)


def test_row_has_mean_spread_and_values_by_seed() -> None:
    [row] = rows_of([outcome("dpca", 1, result(0.4, side=True)), outcome("dpca", 0, result(0.2, side=True))])
    assert row["cosine_loss"] == pytest.approx(0.3)
    assert row["spread"]["cosine_loss"] == pytest.approx(0.1 * 2**0.5)  # the standard deviation of a sample of two
    assert row["seeds"] == [0, 1]
    assert row["per_seed"]["cosine_loss"] == [0.2, 0.4]
    assert row["recall_side"]["20"] == pytest.approx(0.7)
    assert row["mse_as_decoded"] is None
    assert row["use"]["dead_levels"] == [0, 1, 2]


def test_one_seed_has_no_spread_and_a_failed_run_has_no_row() -> None:
    rows = rows_of([outcome("dpca", 0, result(0.2)), outcome("lfq", 0, None)])
    assert [row["method"] for row in rows] == ["dpca"]
    assert rows[0]["spread"]["cosine_loss"] is None


def test_combined_handles_nested_values_and_none() -> None:
    values = [{"a": [1, 2], "b": None}, {"a": [3, 6], "b": None}]
    assert combined(values, max) == {"a": [3, 6], "b": None}


def test_table_is_ordered_by_loss() -> None:
    rows = rows_of([outcome("dpca", 0, result(0.4, side=True)), outcome("faiss_lsq", 0, result(0.3))])
    rows.append({"corpus": "text", "method": REFERENCE, "bits": 24, "real_bits": 24.0, "cosine_loss": 0.35, "mse": 0.6})
    cells = table_rows(rows, "text", 24)
    assert [cell["method"] for cell in cells] == ["faiss_lsq", REFERENCE, "dpca"]
    assert cells[2]["entropy"] == pytest.approx(18 / 24)
    assert cells[2]["dead"] == 3
    assert cells[0].get("SIDE R@20") is None


def test_goals_compare_the_methods_with_the_best_validation_loss() -> None:
    rows = rows_of(
        [
            outcome("dpca", 0, result(0.30, validation=0.31)),
            outcome("structured_85x3", 0, result(0.29, validation=0.33)),
            outcome("faiss_lsq", 0, result(0.295)),
            outcome("rqvae_ema", 0, result(0.40)),
            outcome("rqvae_gradient", 0, result(0.50)),
            outcome("fsq_clamp", 0, result(0.25)),
        ]
    )
    cells = [goal.cells() for goal in goals_of(rows)]
    results = [(cell["ours"], cell["against"], cell["reached"]) for cell in cells]
    assert results == [("dpca", "faiss_lsq", "no"), ("dpca", "rqvae_ema", "yes"), ("dpca", "fsq_clamp", "no")]
    assert cells[1]["change"] == pytest.approx(-0.25)


def test_goals_need_results_of_the_same_bits() -> None:
    rows = rows_of([outcome("dpca", 0, result(0.3), bits=32), outcome("faiss_lsq", 0, result(0.2), bits=32)])
    assert goals_of(rows) == []


def test_figures_are_drawn_for_corpora_with_results() -> None:
    rows = rows_of([outcome("dpca", 0, result(0.4, side=True)), outcome("faiss_lsq", 0, result(0.3), bits=32)])
    names = [plot.name for plot in figures.plots(rows, "text")]
    assert names == ["quantizers-text-loss", "quantizers-text-recall", "quantizers-text-prefix"]
    assert all(figures.png(plot).startswith(b"\x89PNG") for plot in figures.plots(rows, "text"))
    assert figures.plots(rows, "glove") == []


def test_cell_without_a_value_is_empty() -> None:
    assert "| a |  |" in markdown_table([{"x": "a"}], {"x": "", "y": ".2f"})
