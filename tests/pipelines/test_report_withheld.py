"""Verdicts, gains and returns in the report that are withheld or marked."""

import csv
import io
import re

from sidestack.pipelines.report.blocks import between_block, gains_block, return_block, segment_blocks, withheld_block
from sidestack.pipelines.report.comparison import Learning
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.lead import lead
from sidestack.pipelines.report.page import render_page
from sidestack.pipelines.report.table import as_csv, as_markdown, as_text
from tests.pipelines.small_comparison import CURVES, NO_FILE, comparison, page, unjudged

FALLING = {"side": Learning(train_ne=0.9, late_fall=0.0812)}
WORDS = "withheld (side has not converged: training NE fell by 8.1 % in the last quarter)"


def test_withheld_verdict_has_the_same_words_everywhere() -> None:
    given = comparison(learning=FALLING)
    assert lead(given)[1].startswith(f"side: click and conversion {WORDS}; ")
    assert WORDS in re.sub(r"\n  ", " ", as_text(given)) and WORDS in as_markdown(given)
    assert WORDS in render_page(given, (), {}, NO_FILE)
    rows = {(row["arm"], row["task"]): row for row in csv.DictReader(io.StringIO(as_csv(given)))}
    side = rows["side", "click"]
    assert f"{side['verdict']} ({side['reasons']})" == WORDS and float(side["ne_gain"]) == 1 - 0.6347 / 0.6678
    assert rows["sid_ngram", "click"]["verdict"] == "better" and rows["none", "click"]["verdict"] == ""
    texts = {plot.name: plot.text for plot in plots(given, CURVES)}
    assert f"side {WORDS}" in texts["ne_gain_click"] and f"side {WORDS} for 408 B a row" in texts["cost_click"]
    assert "1-2 withheld (11,988 rows)" in texts["segments_click_user"]


def test_a_withheld_gain_is_in_no_headline_and_is_marked_in_the_details() -> None:
    given = comparison(learning=FALLING)
    text = as_text(given)
    assert re.search(r"^side +0.6347 +withheld +0.8800 ", text, re.MULTILINE) and "4.96" not in text
    assert [row[:3] for row in withheld_block(given).rows] == [
        ("side", "click", "+4.96 % ?"), ("side", "conversion", "+2.11 % ?"),
    ]  # fmt: skip
    assert between_block(given).rows[0][2] == "+3.80 % ?"  # side over another arm
    assert gains_block(given, "click").rows[2][1::3] == ("+0.50 % ?", "+0.99 % ?")
    assert segment_blocks(given)[0].rows[2][2].startswith("+4.96\u00a0%\u00a0?")
    assert return_block(given).rows[2][1] == "withheld" and return_block(given).rows[1][1] == "+0.63 %"
    assert "Measured, and withheld" in render_page(given, (), {}, NO_FILE) and "Measured, and" not in page()


def test_one_training_is_never_shown_as_a_result() -> None:
    given = comparison(replicates=1)
    words = "withheld (one training: not a result)"
    assert [words in line for line in lead(given)] == [True, True]
    assert "conversion no difference shown" in lead(given)[0]
    cells = [cell for row in gains_block(given, "click").rows[1:] for cell in row[1::3]]
    cells += [row[2] for row in between_block(given).rows]
    assert all(cell.endswith("?") for cell in cells)


def test_only_the_gauc_of_few_users_is_marked() -> None:
    few = comparison(rules=VerdictConfig(min_users=1500))
    text = as_text(few)
    assert re.search(r"^side .* 0.8800 +0.8000 \? +1.010$", text, re.MULTILINE)
    assert "? stands on fewer than 1,500 users: not a result" in text
    assert gains_block(few, "click").rows[2][1::3] == ("+0.50 %  ", "+0.99 % ?")
    assert "?" not in as_text(comparison())


def test_segments_of_few_positives_are_marked() -> None:
    given = comparison(rules=VerdictConfig(min_positives=1100))
    assert segment_blocks(given)[0].rows[2][2].startswith("+4.96\u00a0%\u00a0?")
    assert "click better" in lead(given)[1]


def test_reason_for_a_withheld_roi_is_shown() -> None:
    arms = comparison().arms
    side = arms["side"].model_copy(update={"roi": None, "roi_withheld": "gains are withheld"})
    given = comparison(arms={**arms, "side": side})
    assert return_block(given).rows[2][2] == "withheld"
    assert "RoI of side is withheld: gains are withheld" in as_text(given)


def test_roi_of_gains_within_noise_is_marked() -> None:
    arms = unjudged().arms
    flat = arms["sid_ngram"].tasks["conversion"]
    tasks = {"click": flat, "conversion": flat}
    given = comparison(arms={**arms, "sid_ngram": arms["sid_ngram"].model_copy(update={"tasks": tasks})})
    assert return_block(given).rows[1][1:3] == ("+0.05 % ~", "+0.53 % ~")
    assert return_block(comparison()).rows[1][1:3] == ("+0.63 %", "+0.53 %")
