"""The report: units, tables, figures and the page, from small comparisons written by hand."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sidestack.infra.errors import DataError
from sidestack.infra.tables import TaskSpec
from sidestack.pipelines.report import units
from sidestack.pipelines.report.blocks import (
    between_block,
    gains_block,
    return_block,
    segment_blocks,
    tables_block,
    trainings_block,
    withheld_block,
)
from sidestack.pipelines.report.blocks_trained import learning_block, rates_block, training_block
from sidestack.pipelines.report.comparison import (
    ArmResult,
    Comparison,
    DecileResult,
    EncoderResult,
    Gain,
    IdTable,
    LabelCounts,
    Learning,
    MetricResult,
    Segment,
    SignalLoss,
    TaskResult,
    Training,
)
from sidestack.pipelines.report.config import VerdictConfig
from sidestack.pipelines.report.drawing import DARK, LIGHT, Plot, Theme, arm_colors, render
from sidestack.pipelines.report.encoder import read_encoder
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.figures_learning import _spread
from sidestack.pipelines.report.gains import _Contest
from sidestack.pipelines.report.lead import lead
from sidestack.pipelines.report.outputs import Curve, learning_curve, read_curves
from sidestack.pipelines.report.page import RunFile, render_page
from sidestack.pipelines.report.table import as_csv, as_markdown, as_text
from sidestack.pipelines.report.verdict import with_verdicts
from sidestack.ranker.intervals import Sums, pooled_deviation
from sidestack.ranker.metric_registry import all_metrics

CLICK: dict[str, Curve] = {
    "none": [(50.0, 0.9), (100.0, 0.7), (150.0, 0.68)],
    "sid_ngram": [(50.0, 0.9), (100.0, 0.69), (150.0, 0.679)],
    "side": [(50.0, 0.8), (100.0, 0.66), (150.0, 0.64)],
}
CURVES = {name: {"train_click_ne": curve, "train_conversion_ne": curve} for name, curve in CLICK.items()}


def task(ne: float, reference: float, spread: float, over: dict[str, Gain] | None = None) -> TaskResult:
    gain = 1 - ne / reference
    is_reference = ne == reference
    gains = {} if is_reference else {"none": between(gain, spread, spread), **(over or {})}
    in_auc = {} if is_reference else {"none": between(gain / 10, 0.001, 0.002)}
    in_gauc = {} if is_reference else {"none": between(gain / 5, 0.002, 0.002)}
    metrics = {
        "ne": MetricResult(value=ne, replicates=(ne - 0.001, ne + 0.001), over=gains),
        "auc": MetricResult(value=0.88, over=in_auc),
        "gauc": MetricResult(value=0.8, over=in_gauc, counts={"users": 1200, "rows": 9000}),
        "calibration": MetricResult(value=1.01),
    }
    return TaskResult(
        num=12_000, positives=1100, users=2301, metrics=metrics, deciles=DECILES,
        segments={kind: segments(gains.get("none")) for kind in ("user", "item")},
    )  # fmt: skip


def between(gain: float, below: float, above: float) -> Gain:
    return Gain(gain=gain, interval=(gain - below, gain + above), replicates=(0.001, 0.004), seeds=0.0021)


def undefined_task(num: int, positives: int) -> TaskResult:
    """Return the results of a task whose metrics are not defined."""
    return TaskResult(num=num, positives=positives, metrics={name: MetricResult(value=None) for name in all_metrics()})


DECILES = tuple(DecileResult(rows=1200, predicted=0.05 * step, observed=0.04 * step) for step in range(10))


def segments(gain: Gain | None) -> tuple[Segment, ...]:
    few = Segment(name="0", rows=12, users=3, positives=1, gain=None)
    return few, Segment(name="1-2", rows=11_988, users=2000, positives=1099, gain=gain)


def arm(click: TaskResult, conversion: TaskResult, **costs: Any) -> ArmResult:
    given = {
        "sid_table_bytes": 0, "table_bytes": 12_690_000, "feature_bytes_per_row": 0.0, "samples_per_second": 12_345.6,
        "peak_memory_bytes": 1_300_000_000, "train_seconds": 61.2, "parameters": 3_200_000, "world_size": 2,
        "flops_per_sample": 254_321.0,
        "roi": None,
        "training": Training(
            steps=564, epochs=1, batch_size=1024, sparse_learning_rate=0.0125, dense_learning_rate=0.004
        ),
    }  # fmt: skip
    return ArmResult(tasks={"click": click, "conversion": conversion}, **{**given, **costs})


USERS = IdTable(
    table="t_user_id", is_sid=False, possible_ids=2_469, distinct_ids=2_300, rows=2_469, collision_share=0.0,
    bytes=316_032, held_out_ids=1_000, never_seen=5,
)  # fmt: skip
PREFIXES = IdTable(
    table="t_item_sid_prefix_10", is_sid=True, possible_ids=59_049, distinct_ids=9_000, rows=4_096,
    collision_share=0.889, bytes=524_288, held_out_ids=1_000, never_seen=120,
)  # fmt: skip


NO_FILE = RunFile("", "nobody wrote it")
LEARNED = Learning(train_ne=0.66, late_fall=0.01)


def comparison(
    learning: Mapping[str, Learning | None] | None = None, rules: VerdictConfig | None = None, **changes: Any
) -> Comparison:
    """Return a judged comparison with two trainings of each arm; `learning` replaces the learning of some arms."""
    given, rules = unjudged(**changes), rules or VerdictConfig()
    results = {task: {name: one.tasks[task] for name, one in given.arms.items()} for task in given.tasks}
    learnings = {name: (learning or {}).get(name, LEARNED) for name in given.arms}
    judged = {
        task: with_verdicts(of_task, learnings, rules, given.reference, given.replicates)
        for task, of_task in results.items()
    }
    arms = {
        name: one.model_copy(update={"tasks": {task: judged[task][name] for task in given.tasks}})
        for name, one in given.arms.items()
    }
    return given.model_copy(update={"arms": arms, "rules": rules})


def unjudged(**changes: Any) -> Comparison:
    over_ngram = {"sid_ngram": Gain(gain=0.038, interval=(0.03, 0.046))}
    arms = {
        "none": arm(task(0.6678, 0.6678, 0.0), task(0.95, 0.95, 0.0), tables=(USERS,)),
        "sid_ngram": arm(
            task(0.6597, 0.6678, 0.004), task(0.9495, 0.95, 0.002),
            sid_table_bytes=100_663_296, table_bytes=113_353_296, feature_bytes_per_row=1224.0, roi=0.0053,
            tables=(USERS, PREFIXES),
        ),
        "side": arm(
            task(0.6347, 0.6678, 0.009, over_ngram), task(0.93, 0.95, 0.01),
            feature_bytes_per_row=408.0, roi=0.0886,
        ),
    }  # fmt: skip
    encoder = EncoderResult(
        items=500, unique_share=0.87, entropy_bits=(1.5, 1.4), most_bits=1.585,
        histogram=((100, 200, 200), (50, 250, 200)),
        losses=(
            SignalLoss(name="text", kind="cosine", loss=0.21, top1=None),
            SignalLoss(name="brand", kind="cross-entropy", loss=2.4, top1=0.487),
        ),
    )  # fmt: skip
    given: dict[str, Any] = {
        "reference": "none", "confidence": 0.95, "resamples": 1000, "seed": 0, "rows": 291_204, "users": 2301,
        "origin": "made by hand", "train": ("2017-09-10", "2017-11-11"), "held_out": ("2017-11-12", "2017-12-09"),
        "config_digest": "c0ffee" * 10, "versions": {"torch": "2.13.0"}, "inputs": {"arm.none": "ab" * 32},
        "warnings": (), "arms": arms, "encoder": encoder,
        "replicates": 2, "differs": ("training.seed: 0 in none; 1 in side",),
        "trained_on": {"click": LabelCounts(rows=98_000, positives=9_000)},
        "earlier_task": "click", "tasks": {"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    }  # fmt: skip
    return Comparison(**{**given, **changes})


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


def test_pooled_deviation_is_explained_only_for_three_arms() -> None:
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


def all_plots() -> tuple[Plot, ...]:
    return plots(comparison(), CURVES)


@pytest.mark.parametrize("plot", all_plots(), ids=lambda plot: plot.name)
def test_figures_are_complete_and_reproducible(plot: Plot) -> None:
    light, dark = render(plot, LIGHT, "svg"), render(plot, DARK, "svg")
    assert light == render(plot, LIGHT, "svg")
    assert light != dark
    root = ElementTree.fromstring(light)
    assert root.tag.endswith("svg")
    assert not list(root.iter("{http://www.w3.org/2000/svg}text")), "text is drawn as outlines, equal on every machine"
    assert render(plot, LIGHT, "png").startswith(b"\x89PNG\r\n")


def test_figures_have_a_text_of_their_content() -> None:
    texts = {plot.name: plot.text for plot in all_plots()}
    assert texts["ne_gain_click"] == "NE gain, click over none: sid_ngram +1.21 %, side +4.96 %"
    assert "side ends at 0.6400" in texts["learning_click"]
    assert "side from 0.80 to 0.80" in texts["reliability_click"]
    assert "side 0 not defined (12 rows), 1-2 +4.96 % (11,988 rows)" in texts["segments_click_user"]
    assert "3 values, for 2 digits; the most used value of a digit has 40% to 50%" in texts["codebook_use"]


def test_without_history_there_is_no_learning_curve() -> None:
    curves = {"none": {}, "side": {"train_conversion_ne": CLICK["side"]}}
    names = [plot.name for plot in plots(comparison(), curves)]
    assert "learning_click" not in names and "learning_conversion" in names


def test_arm_has_the_same_colour_in_any_set_of_arms() -> None:
    arms = comparison().arms
    fewer = unjudged(arms={"side": arms["side"], "zz_new": arms["none"]})
    assert arm_colors(fewer, LIGHT)["side"] == arm_colors(comparison(), LIGHT)["side"]
    assert len(set(arm_colors(fewer, LIGHT).values())) == 2


def test_arms_of_no_known_kind_cycle_through_the_colours() -> None:
    arm = comparison().arms["none"]
    others = [f"other_{n}" for n in range(8)]
    colors = arm_colors(unjudged(arms=dict.fromkeys([*others, "kmeans"], arm)), DARK)
    turns = ["#e0c04a", "#a4adb7", "#ff8a3d", "#5cb3f0", "#3fcf9f", "#e39acb", "#86cdf2", "#e0c04a"]
    assert list(colors.values()) == [*turns, "#e39acb"]


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_enough_contrast_with_the_page(theme: Theme) -> None:
    def contrast(color: str) -> float:
        low, high = sorted((luminance(color), luminance(theme.paper)))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(color) for color in (theme.ink, theme.muted)) >= 4.5  # WCAG 2, text
    assert (
        min(contrast(color) for color in (*theme.kinds.values(), theme.other)) >= 3.0
    )  # WCAG 2, graphics and bold letters


def lines_of(plot: Plot) -> list[Line2D]:
    """Return the lines that a plot draws."""
    axes = Figure().add_subplot()
    plot.draw(axes, LIGHT)
    found: list[Line2D] = list(axes.get_lines())
    return found


def test_a_curve_of_one_point_is_a_dot_and_none_is_clipped() -> None:
    curves = {"none": {"train_click_ne": [(98.0, 1.0)]}, "side": {"train_click_ne": CLICK["side"]}}
    plot = next(one for one in plots(comparison(), curves) if one.name == "learning_click")
    dot, curve, *_ = lines_of(plot)
    assert dot.get_marker() == "o" and curve.get_marker() == ""
    low, high = curve.axes.get_ylim()
    assert low < 0.64 and high > 1.0 and curve.axes.get_xlim() == (0, 150)


def test_a_training_far_from_the_others_is_drawn_inside_the_figure() -> None:
    given = comparison()
    side = given.arms["side"]
    task = side.tasks["click"]
    metric = task.metrics["ne"]
    over = {"none": metric.over["none"].model_copy(update={"replicates": (-0.3, 0.04, 0.2)})}
    metrics = {**task.metrics, "ne": metric.model_copy(update={"over": over})}
    tasks = {**side.tasks, "click": task.model_copy(update={"metrics": metrics})}
    arms = {**given.arms, "side": side.model_copy(update={"tasks": tasks})}
    plot = next(one for one in plots(given.model_copy(update={"arms": arms}), CURVES) if one.name == "ne_gain_click")
    low, high = lines_of(plot)[0].axes.get_xlim()
    assert low < -0.3 and high > 0.2


def test_validation_is_drawn_dashed() -> None:
    curves = {"side": {"train_click_ne": CLICK["side"], "search_validation_click_ne": [(50.0, 0.9), (150.0, 0.7)]}}
    plot = next(one for one in plots(comparison(), curves) if one.name == "learning_click")
    assert [line.get_linestyle() for line in lines_of(plot)] == ["-", "--"]
    assert "side ends at 0.6400, side at 0.7000 in validation" in plot.text


def test_labels_of_equal_ends_are_moved_apart() -> None:
    placed = dict(_spread({"a": 0.5, "b": 0.5, "c": 0.9}, (0.0, 1.0)))
    assert placed["b"] - placed["a"] == pytest.approx(0.085)
    assert placed["c"] == 0.9
    assert min(dict(_spread({"a": 0.0, "b": 0.0}, (0.0, 1.0))).values()) == pytest.approx(0.085 / 2)


class Balance(HTMLParser):
    """A parser that collects what the page would load, and fails on tags that do not close in order."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(**changes: Any) -> str:
    configs = {"arm.none": "arm: none\n", "dataset": ""}
    return render_page(comparison(**changes), all_plots()[:2], configs, RunFile("run: {name: again}\n"))


def test_page_is_well_formed_and_loads_nothing() -> None:
    text = page()
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.loads) == 4  # two figures, light and dark
    assert all(value.startswith("data:image/svg+xml;base64,") for value in parser.loads)
    assert not parser.tags & {"script", "link", "iframe", "object"}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in text


def test_page_describes_the_run() -> None:
    text = page(warnings=("arms ran apart",))
    for expected in (
        "made by hand", "c0ffee" * 10, "2017-09-10 to 2017-11-11", "2017-11-12 to 2017-12-09", "torch 2.13.0",
        "291,204 impressions", "98,000", "9.18 %", "arms differ in training.seed: 0 in none; 1 in side",
        "run: {name: again}", "87.0 % of the 500 held-out items", "withheld below 100 held-out positives",
        "configuration of arm.none", "side over sid_ngram",
        "arms ran apart", "cross-entropy", "48.7 %",
    ):  # fmt: skip
        assert expected in text, expected
    assert "configuration of dataset" not in text
    assert text.index("better, NE gain") < text.index("98,000") < text.index("<h2>Results")
    alone = render_page(comparison(), (), {}, NO_FILE)
    assert "not one run's file: nobody wrote it" in alone and "for <code>--config" not in alone


def test_page_escapes_html() -> None:
    text = page(origin="<script>alert(1)</script>")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_learning_curve_is_the_training_ne_of_the_task() -> None:
    curve: Curve = [(1.0, 0.5)]
    curves: dict[str, Curve] = {
        "test_click_ne": [(9.0, 0.4)], "train_click_loss": [], "train_click_ne": curve,
        "train_conversion_ne": [(2.0, 0.9)], "learning_rate": [],
    }  # fmt: skip
    assert learning_curve(curves, "click") == curve
    assert learning_curve({"train_click_late_ne": curve}, "click") == []  # of a task whose name has the same prefix


def test_curves_leave_out_nulls(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 1, "a": null, "b": 2}\n{"step": 2, "a": 0.5}\n')
    assert read_curves(tmp_path) == {"a": [(2.0, 0.5)], "b": [(1.0, 2.0)]}
    assert read_curves(tmp_path / "nowhere") == {}
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"a": 1}\n')
    with pytest.raises(DataError, match=r"history.jsonl, line 2: must be a JSON object with a step"):
        read_curves(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"holdout": {"digits": 3}})])
def test_an_encoder_without_measures_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(DataError, match="summary.json"):
        read_encoder(tmp_path)


def test_shared_tables_are_listed_once_and_tables_of_sids_for_each_arm() -> None:
    block = tables_block(comparison())
    assert block.columns == ("table", "possible ids", "ids seen", "rows", "share a row", "never seen", "bytes")
    assert block.rows == (
        ("every arm", "user_id", "2,469", "2,300", "2,469", "", "0.50%", "309 KiB"),
        ("sid_ngram", "item_sid_prefix_10", "59,049", "9,000", "4,096", "88.9%", "12.00%", "512 KiB"),
    )
    assert tables_block(comparison(), only_sids=True).rows == block.rows[1:]
    assert "Embedding tables" in render_page(comparison(), [], {}, NO_FILE)
