"""The report's tables: units, text, Markdown, CSV and blocks of a comparison written by hand."""

import csv
import io
import re

import numpy as np
import pytest

from sidestack.pipelines.report import units
from sidestack.pipelines.report.blocks import between_block, gains_block, segment_blocks, tables_block, trainings_block
from sidestack.pipelines.report.blocks_trained import learning_block, rates_block, training_block
from sidestack.pipelines.report.comparison import Learning, MetricResult
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.gains import _Contest
from sidestack.pipelines.report.lead import lead
from sidestack.pipelines.report.page import render_page
from sidestack.pipelines.report.table import as_csv, as_markdown, as_text
from sidestack.ranker.intervals import Sums, pooled_deviation
from tests.pipelines.small_comparison import CURVES, NO_FILE, arm, comparison, page, undefined_task, unjudged

TABLE = """\
held out 2017-11-12 to 2017-12-09 · 291,204 impressions · 2,301 users

sid_ngram: click better, NE gain +1.21 % (+0.81 to +1.61 %); conversion no difference shown
  (-0.15 to +0.25 %); 96.0 MiB of SID tables.
side: click better, NE gain +4.96 % (+4.06 to +5.86 %); conversion better, NE gain +2.11 % (+1.11 to +3.11 %);
  0 B of SID tables.

task        training rows     positive     held-out rows     positive        users
──────────────────────────────────────────────────────────────────────────────────
click              98,000       9.18 %            12,000       9.17 %        2,301
conversion                                        12,000       9.17 %        2,301

training            steps       epochs        batch rows  sparse rate   dense rate
──────────────────────────────────────────────────────────────────────────────────
none                  564            1             1,024       0.0125        0.004
sid_ngram             564            1             1,024       0.0125        0.004
side                  564            1             1,024       0.0125        0.004

click                  NE    NE gain       95 % interval      ± seeds          AUC       GAUC  calibration
──────────────────────────────────────────────────────────────────────────────────────────────────────────
none               0.6678  reference                                        0.8800     0.8000        1.010
sid_ngram          0.6597    +1.21 %    +0.81 to +1.61 %       0.21 %       0.8800     0.8000        1.010
side               0.6347    +4.96 %    +4.06 to +5.86 %       0.21 %       0.8800     0.8000        1.010

conversion             NE    NE gain       95 % interval      ± seeds          AUC       GAUC  calibration
──────────────────────────────────────────────────────────────────────────────────────────────────────────
none               0.9500  reference                                        0.8800     0.8000        1.010
sid_ngram          0.9495    +0.05 % ~  -0.15 to +0.25 %       0.21 %       0.8800     0.8000        1.010
side               0.9300    +2.11 %    +1.11 to +3.11 %       0.21 %       0.8800     0.8000        1.010

cost           SID tables   all tables     feature a row   parameters  FLOPs a row  samples/s  peak memory
──────────────────────────────────────────────────────────────────────────────────────────────────────────
none                  0 B     12.1 MiB               0 B       3.20 M        254 k     12.3 k     1.21 GiB
sid_ngram        96.0 MiB      108 MiB          1.20 KiB       3.20 M        254 k     12.3 k     1.21 GiB
side                  0 B     12.1 MiB             408 B       3.20 M        254 k     12.3 k     1.21 GiB

arms differ in training.seed: 0 in none; 1 in side
NE gain is 1 - NE / NE(none); the interval is over users and 2 trainings, ± seeds its deviation over trainings
the deviation over trainings is pooled over 3 arms: with 2 trainings an interval extends 3.0 deviations to
  each side, with 3 1.6 (Student's t); to resolve small gains, raise run.replicates: finished trainings are
  kept
~ the interval holds 0: no difference is shown
GAUC: AUC within users of both labels, by rows (click 1,200 users, 9,000 rows; conversion 1,200 users, 9,000
  rows)
calibration: predicted positives over those that there were; 1 is right, 1.1 is a tenth too many
FLOPs: matrix products of the dense part, forward; lookups and attention are not counted
"""


def test_terminal_table_matches_the_expected_text() -> None:
    assert as_text(comparison()) == TABLE


def test_pooled_deviation_is_explained_only_when_several_arms_are_pooled() -> None:
    arms = unjudged().arms
    alone = {"none": arms["none"], "baseline": arms["side"]}
    text = as_text(comparison(arms=alone))
    assert "pooled over" not in text and "nan" not in text
    assert "pooled over 3 arms" in as_text(comparison())


def test_arm_without_sums_is_left_out_of_the_pooled_deviation() -> None:
    sums_R = {"a": np.array([1.0, 1.1]), "b": np.array([1.2, 1.2]), "c": np.array([0.9, 1.0]), "empty": np.zeros(2)}
    drawn_B = np.ones(8)
    sums = {name: {"ne": Sums(trained_R, drawn_B)} for name, trained_R in sums_R.items()}
    contest = _Contest(None, sums, tuple(sums), 0, 0.95)
    expected = pooled_deviation(np.stack([sums_R[name] for name in "abc"]))
    assert contest._deviation("a", "b", "ne") == expected
    assert expected.degrees == 2 and expected.deviation > 0


def test_terminal_table_stays_aligned_with_long_names() -> None:
    arms = comparison().arms
    text = as_text(comparison(arms={"none": arms["none"], "side_with_a_long_name": arms["side"]}))
    results = text[text.index("\nclick", text.index("\ntraining")) :]
    lines = [line for line in results.splitlines() if re.match("(click|conversion|cost|none|side)  ", line)]
    assert len({len(line) for line in lines}) == 1


def test_warnings_are_printed_below_the_table() -> None:
    assert as_text(comparison(warnings=("arms ran apart",))).endswith("arms ran apart\n")


def test_footnote_on_zero_only_when_something_is_marked() -> None:
    arms = comparison().arms
    assert "~" not in as_text(comparison(arms={"none": arms["none"]}))


@pytest.mark.parametrize(
    ("num", "positives", "reason"),
    [(0, 0, "no labelled rows"), (9, 0, "no positives"), (9, 9, "no negatives")],
)
def test_undefined_metrics_are_named_with_the_reason(num: int, positives: int, reason: str) -> None:
    arms = {name: arm(old.tasks["click"], undefined_task(num, positives)) for name, old in comparison().arms.items()}
    given = comparison(arms=arms)
    assert f"conversion  undefined ({reason})" in as_text(given)
    assert f"conversion: undefined ({reason})" in as_markdown(given)
    assert f"conversion undefined ({reason})" in lead(given)[0]
    assert {plot.name for plot in plots(given, CURVES)} == {
        "ne_gain_click", "learning_click", "cost_click", "reliability_click", "segments_click_user",
        "segments_click_item", "codebook_use",
    }  # fmt: skip


def test_markdown_tables_are_regular() -> None:
    tables = [block.splitlines() for block in as_markdown(comparison()).split("\n\n") if block.startswith("|")]
    assert [table[0].split(" | ")[0] for table in tables] == [
        "| task", "| training", "| click", "| conversion", "| cost", "| return",
        "| click, learning", "| conversion, learning", "| click, further gains", "| conversion, further gains",
        "| click, NE", "| conversion, NE",
        "| click, by user", "| click, by item", "| conversion, by user", "| conversion, by item",
    ]  # fmt: skip
    for table in tables:
        assert len({line.count("|") for line in table}) == 1


def test_csv_holds_unrounded_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison()))))
    assert [(row["arm"], row["task"]) for row in rows[:3]] == [
        ("none", "click"), ("none", "conversion"), ("sid_ngram", "click"),
    ]  # fmt: skip
    assert float(rows[4]["ne_gain"]) == 1 - 0.6347 / 0.6678
    assert rows[0]["ne_gain"] == rows[0]["ne_gain_low"] == rows[0]["auc_gain_low"] == ""
    assert "calibration_gain" not in rows[0]
    gain = float(rows[4]["auc_gain"])
    assert [float(rows[4][f"auc_gain_{bound}"]) for bound in ("low", "high")] == [gain - 0.001, gain + 0.002]


def test_pairs_leave_the_reference_out() -> None:
    block = between_block(comparison())
    assert [row[:3] for row in block.rows] == [("side over sid_ngram", "click", "+3.80 %  ")]


def test_gains_block_shows_the_gains_in_auc_and_gauc() -> None:
    none, ngram, side = gains_block(comparison(), "click").rows
    assert none == ("none", *("reference  ", "", "") * 2)
    in_auc, in_gauc = ("+0.12 %  ", "+0.02 to +0.32 %", "0.21 %"), ("+0.24 %  ", "+0.04 to +0.44 %", "0.21 %")
    assert ngram == ("sid_ngram", *in_auc, *in_gauc)
    assert gains_block(comparison(), "conversion").rows[1][1::3] == ("+0.01 % ~", "+0.01 % ~")
    assert side[1] == "+0.50 %  "


def test_undefined_gain_is_left_out() -> None:
    arms = comparison().arms
    click = arms["side"].tasks["click"]
    click = click.model_copy(update={"metrics": {**click.metrics, "gauc": MetricResult(value=None)}})
    arms["side"] = arms["side"].model_copy(update={"tasks": {**arms["side"].tasks, "click": click}})
    assert gains_block(comparison(arms=arms), "click").rows[2][4:] == ("", "", "")
    assert re.search(r"^side .* 0.8800 +1.010$", as_text(comparison(arms=arms)), re.MULTILINE)


def test_segments_are_shown_with_their_rows_and_without_undefined_gains() -> None:
    block = segment_blocks(comparison())[0]
    assert (block.title, block.columns) == ("click, by user", ("click 0", "click 1-2"))
    rows = [tuple(cell.replace("\u00a0", " ") for cell in row) for row in block.rows]
    assert rows[:2] == [("rows", "12", "11,988"), ("sid_ngram", "", "+1.21 % (+0.81 to +1.61 %)")]
    assert "-0.15 to +0.25 %" in segment_blocks(comparison())[2].rows[1][2].replace("\u00a0", " ")


def test_trainings_are_shown_when_there_are_several() -> None:
    given = comparison()
    block = trainings_block(given, "click")
    assert block.columns == ("training 0", "training 1") and block.rows[0] == ("none", "0.6668", "0.6688")
    text = as_text(given)
    assert "the interval is over users and 2 trainings, ± seeds its deviation over trainings" in text
    assert re.search(r"^side .* to \+5.86 % +0.21 % ", text, re.MULTILINE)
    assert "click, NE" in as_markdown(given) and "click, NE" not in as_markdown(comparison(replicates=1))
    assert "2 of each arm, each with its own seeds" in render_page(given, (), {}, NO_FILE)
    assert "Student" in render_page(given, (), {}, NO_FILE) and "Student" not in page(replicates=1)


def test_lead_claims_no_more_than_the_intervals_allow() -> None:
    ngram, side = (line.replace("\u00a0", " ") for line in lead(comparison()))
    assert ngram == (
        "sid_ngram: click better, NE gain +1.21 % (+0.81 to +1.61 %); "
        "conversion no difference shown (-0.15 to +0.25 %); 96.0 MiB of SID tables."
    )
    assert side.endswith("0 B of SID tables.")


def test_trainings_are_shown_with_their_steps_and_curves() -> None:
    learning = Learning(train_ne=0.7, late_fall=0.0213, lowest_validation_ne=0.71, last_validation_ne=0.72)
    given = comparison(learning={"side": learning})
    assert training_block(given).rows[2] == ("side", "564", "1", "1,024", "0.0125", "0.004")
    assert learning_block(given, "click").rows[2] == ("side", "0.7000", "+2.13 %", "0.7100", "0.7200")
    assert rates_block(given).rows == (
        ("click", "98,000", "9.18 %", "12,000", "9.17 %", "2,301"),
        ("conversion", "", "", "12,000", "9.17 %", "2,301"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.byte_size(0), "0 B"),
        (units.byte_size(1023), "1023 B"),
        (units.byte_size(1024), "1.00 KiB"),
        (units.byte_size(12_690_000), "12.1 MiB"),
        (units.byte_size(1023.6 * 1024), "1.00 MiB"),
        (units.byte_size(5 * 2**40), "5.00 TiB"),
        (units.scaled(950.2), "950"),
        (units.scaled(12_345), "12.3 k"),
        (units.scaled(999_900), "1.00 M"),
        (units.percent(0.01213), "+1.21 %"),
        (units.percent(-0.00004), "0.00 %"),
        (units.percent_interval((-0.001, 0.0034)), "-0.10 to +0.34 %"),
        (units.duration(59.6), "1 min 0 s"),
        (units.duration(41), "41 s"),
        (units.duration(7500), "2 h 5 min"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_shared_tables_are_listed_once_and_tables_of_sids_for_each_arm() -> None:
    block = tables_block(comparison())
    assert block.columns == ("table", "possible ids", "ids seen", "rows", "share a row", "never seen", "bytes")
    assert block.rows == (
        ("every arm", "user_id", "2,469", "2,300", "2,469", "", "0.50%", "309 KiB"),
        ("sid_ngram", "item_sid_prefix_10", "59,049", "9,000", "4,096", "88.9%", "12.00%", "512 KiB"),
    )
    assert tables_block(comparison(), only_sids=True).rows == block.rows[1:]
    assert "Embedding tables" in render_page(comparison(), [], {}, NO_FILE)
