"""The report: units, tables, figures and the page, from small comparisons written by hand."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from infra.errors import DataError
from infra.tables import TaskSpec
from pipelines.report import units
from pipelines.report.blocks import between_block, gains_block, segment_blocks, tables_block, trainings_block
from pipelines.report.comparison import (
    ArmResult,
    Comparison,
    DecileResult,
    EncoderResult,
    Gain,
    IdTable,
    MetricResult,
    Segment,
    SignalLoss,
    TaskResult,
)
from pipelines.report.drawing import DARK, LIGHT, Plot, Theme, arm_colors, render
from pipelines.report.encoder import read_encoder
from pipelines.report.figures import _spread, plots
from pipelines.report.outputs import Curve, learning_curve, read_curves
from pipelines.report.page import lead, render_page
from pipelines.report.table import as_csv, as_markdown, as_text
from ranker.metric_registry import METRICS

CURVES: dict[str, Curve] = {
    "none": [(50.0, 0.9), (100.0, 0.7), (150.0, 0.68)],
    "sid_ngram": [(50.0, 0.9), (100.0, 0.69), (150.0, 0.679)],
    "side": [(50.0, 0.8), (100.0, 0.66), (150.0, 0.64)],
}


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
        num=12_000, positives=1100, metrics=metrics, deciles=DECILES,
        segments={kind: segments(gains.get("none")) for kind in ("user", "item")},
    )  # fmt: skip


def between(gain: float, below: float, above: float) -> Gain:
    return Gain(gain=gain, interval=(gain - below, gain + above))


def nothing(num: int, positives: int) -> TaskResult:
    """Give the results of a task whose metrics are not defined."""
    return TaskResult(num=num, positives=positives, metrics={name: MetricResult(value=None) for name in METRICS})


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


def comparison(**changes: Any) -> Comparison:
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
        "earlier_task": "click", "tasks": {"click": TaskSpec(), "conversion": TaskSpec(given="click")},
    }  # fmt: skip
    return Comparison(**{**given, **changes})


def twice_trained() -> Comparison:
    """Give a comparison of two trainings of each arm."""
    arms = {}
    for name, one in comparison().arms.items():
        tasks = {}
        for task_name, result in one.tasks.items():
            ne, spread = result.metrics["ne"], {"replicates": (0.001, 0.004), "seeds": 0.0021}
            over = {other: gain.model_copy(update=spread) for other, gain in ne.over.items()}
            metrics = {**result.metrics, "ne": ne.model_copy(update={"over": over})}
            tasks[task_name] = result.model_copy(update={"metrics": metrics})
        arms[name] = one.model_copy(update={"tasks": tasks})
    return comparison(arms=arms, replicates=2)


TABLE = """\
held out 2017-11-12 to 2017-12-09 · 291,204 impressions · 2,301 users

click               NE    NE gain       95 % interval     ± seeds          AUC       GAUC  calibration
──────────────────────────────────────────────────────────────────────────────────────────────────────
none            0.6678  reference                                       0.8800     0.8000        1.010
sid_ngram       0.6597    +1.21 %    +0.81 to +1.61 %                   0.8800     0.8000        1.010
side            0.6347    +4.96 %    +4.06 to +5.86 %                   0.8800     0.8000        1.010

conversion          NE    NE gain       95 % interval     ± seeds          AUC       GAUC  calibration
──────────────────────────────────────────────────────────────────────────────────────────────────────
none            0.9500  reference                                       0.8800     0.8000        1.010
sid_ngram       0.9495    +0.05 % ~  -0.15 to +0.25 %                   0.8800     0.8000        1.010
side            0.9300    +2.11 %    +1.11 to +3.11 %                   0.8800     0.8000        1.010

cost        SID tables   all tables     feature a row  parameters  FLOPs a row  samples/s  peak memory
──────────────────────────────────────────────────────────────────────────────────────────────────────
none               0 B     12.1 MiB               0 B      3.20 M        254 k     12.3 k     1.21 GiB
sid_ngram     96.0 MiB      108 MiB          1.20 KiB      3.20 M        254 k     12.3 k     1.21 GiB
side               0 B     12.1 MiB             408 B      3.20 M        254 k     12.3 k     1.21 GiB

NE gain is 1 - NE / NE(none); one seed: the interval is over users, it does not hold the spread of training
~ the interval holds 0: no difference is shown
GAUC: AUC within users of both labels, by rows (click 1,200 users, 9,000 rows; conversion 1,200 users, 9,000 rows)
FLOPs: matrix products of the dense part, forward; lookups and attention are not counted
"""


def test_terminal_table_is_exactly_this() -> None:
    assert as_text(comparison()) == TABLE


def test_terminal_table_stays_aligned_with_long_names() -> None:
    arms = comparison().arms
    text = as_text(comparison(arms={"none": arms["none"], "side_with_a_long_name": arms["side"]}))
    lines = [line for line in text.splitlines() if re.match("click|conversion|cost|none|side", line)]
    assert len({len(line) for line in lines}) == 1


def test_warnings_stand_below_the_table() -> None:
    assert as_text(comparison(warnings=("arms ran apart",))).endswith("arms ran apart\n")


def test_footnote_on_zero_only_when_something_is_marked() -> None:
    arms = comparison().arms
    assert "~" not in as_text(comparison(arms={"none": arms["none"]}))


@pytest.mark.parametrize(
    ("num", "positives", "reason"),
    [(0, 0, "no labelled rows"), (9, 0, "no positives"), (9, 9, "no negatives")],
)
def test_what_is_not_defined_is_said_in_words(num: int, positives: int, reason: str) -> None:
    arms = {name: arm(old.tasks["click"], nothing(num, positives)) for name, old in comparison().arms.items()}
    given = comparison(arms=arms)
    assert f"conversion  undefined ({reason})" in as_text(given)
    assert f"conversion: undefined ({reason})" in as_markdown(given)
    assert f"conversion undefined ({reason})" in lead(given)[0]
    assert {plot.name for plot in plots(given, {"click": CURVES, "conversion": CURVES})} == {
        "ne_gain_click", "learning_click", "cost_click", "reliability_click", "segments_click_user",
        "segments_click_item", "codebook_use",
    }  # fmt: skip


def test_markdown_tables_are_regular() -> None:
    tables = [block.splitlines() for block in as_markdown(comparison()).split("\n\n") if block.startswith("|")]
    assert [table[0].split(" | ")[0] for table in tables] == [
        "| click", "| conversion", "| cost", "| return", "| click, further gains", "| conversion, further gains",
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


def test_ordering_is_told_by_its_gains() -> None:
    none, ngram, side = gains_block(comparison(), "click").rows
    assert none == ("none", *("reference  ", "", "") * 2)
    in_auc, in_gauc = ("+0.12 %  ", "+0.02 to +0.32 %", ""), ("+0.24 %  ", "+0.04 to +0.44 %", "")
    assert ngram == ("sid_ngram", *in_auc, *in_gauc)
    assert gains_block(comparison(), "conversion").rows[1][1::3] == ("+0.01 % ~", "+0.01 % ~")
    assert side[1] == "+0.50 %  "


def test_a_gain_that_is_not_defined_is_left_out() -> None:
    arms = comparison().arms
    click = arms["side"].tasks["click"]
    click = click.model_copy(update={"metrics": {**click.metrics, "gauc": MetricResult(value=None)}})
    arms["side"] = arms["side"].model_copy(update={"tasks": {**arms["side"].tasks, "click": click}})
    assert gains_block(comparison(arms=arms), "click").rows[2][4:] == ("", "", "")
    assert re.search(r"^side .* 0.8800 +1.010$", as_text(comparison(arms=arms)), re.MULTILINE)


def test_segments_are_told_with_their_rows_and_gaps() -> None:
    block = segment_blocks(comparison())[0]
    assert (block.title, block.columns) == ("click, by user", ("click 0", "click 1-2"))
    rows = [tuple(cell.replace("\u00a0", " ") for cell in row) for row in block.rows]
    assert rows[:2] == [("rows", "12", "11,988"), ("sid_ngram", "", "+1.21 % (+0.81 to +1.61 %)")]
    assert "-0.15 to +0.25 %" in segment_blocks(comparison())[2].rows[1][2].replace("\u00a0", " ")


def test_trainings_are_told_where_there_are_several() -> None:
    given = twice_trained()
    block = trainings_block(given, "click")
    assert block.columns == ("training 0", "training 1") and block.rows[0] == ("none", "0.6668", "0.6688")
    text = as_text(given)
    assert "the interval is over users and 2 trainings, ± seeds its deviation over trainings" in text
    assert re.search(r"^side .* to \+5.86 % +0.21 % ", text, re.MULTILINE)
    assert "click, NE" in as_markdown(given) and "click, NE" not in as_markdown(comparison())
    assert "2 of each arm, each with its own seeds" in render_page(given, (), {})
    assert "Student" in render_page(given, (), {}) and "Student" not in page()


def test_lead_claims_no_more_than_the_intervals_allow() -> None:
    ngram, side = (line.replace("\u00a0", " ") for line in lead(comparison()))
    assert ngram == (
        "sid_ngram: click NE gain +1.21 % (+0.81 to +1.61 %); "
        "conversion no difference shown (-0.15 to +0.25 %); 96.0 MiB of SID tables."
    )
    assert side.endswith("0 B of SID tables.")


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
    return plots(twice_trained(), {"click": CURVES, "conversion": CURVES})


@pytest.mark.parametrize("plot", all_plots(), ids=lambda plot: plot.name)
def test_figures_are_whole_and_reproducible(plot: Plot) -> None:
    light, dark = render(plot, LIGHT, "svg"), render(plot, DARK, "svg")
    assert light == render(plot, LIGHT, "svg")
    assert light != dark
    root = ElementTree.fromstring(light)
    assert root.tag.endswith("svg")
    assert not list(root.iter("{http://www.w3.org/2000/svg}text")), "letters are outlines, alike on every machine"
    assert render(plot, LIGHT, "png").startswith(b"\x89PNG\r\n")


def test_figures_tell_their_content_in_words() -> None:
    texts = {plot.name: plot.text for plot in all_plots()}
    assert texts["ne_gain_click"] == "NE gain, click over none: sid_ngram +1.21 %, side +4.96 %"
    assert "side ends at 0.6400" in texts["learning_click"]
    assert "side from 0.80 to 0.80" in texts["reliability_click"]
    assert "side 0 not defined (12 rows), 1-2 +4.96 % (11,988 rows)" in texts["segments_click_user"]
    assert "3 values, for 2 digits; the most used value of a digit has 40% to 50%" in texts["codebook_use"]


def test_without_history_there_is_no_learning_curve() -> None:
    names = [plot.name for plot in plots(comparison(), {"click": {"none": []}, "conversion": CURVES})]
    assert "learning_click" not in names and "learning_conversion" in names


def test_an_arm_has_one_colour_whatever_arms_stand_beside_it() -> None:
    arms = comparison().arms
    fewer = comparison(arms={"side": arms["side"], "zz_new": arms["none"]})
    assert arm_colors(fewer, LIGHT)["side"] == arm_colors(comparison(), LIGHT)["side"]
    assert len(set(arm_colors(fewer, LIGHT).values())) == 2


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_on_their_page(theme: Theme) -> None:
    def contrast(color: str) -> float:
        low, high = sorted((luminance(color), luminance(theme.paper)))
        return (high + 0.05) / (low + 0.05)

    assert min(contrast(color) for color in (theme.ink, theme.muted)) >= 4.5  # WCAG 2, text
    assert min(contrast(color) for color in theme.arms) >= 3.0  # WCAG 2, graphics and bold letters


def test_labels_of_equal_ends_are_moved_apart() -> None:
    placed = dict(_spread({"a": 0.5, "b": 0.5, "c": 0.9}, (0.0, 1.0)))
    assert placed["b"] - placed["a"] == pytest.approx(0.085)
    assert placed["c"] == 0.9


class Balance(HTMLParser):
    """Collects what the page would load, and fails on tags that do not close in order."""

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
    return render_page(comparison(**changes), all_plots()[:2], {"arm.none": "arm: none\n", "dataset": ""})


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


def test_page_says_what_was_run() -> None:
    text = page(warnings=("arms ran apart",))
    for expected in (
        "made by hand", "c0ffee" * 10, "2017-09-10 to 2017-11-11", "2017-11-12 to 2017-12-09", "torch 2.13.0",
        "291,204 impressions", "1,100 positives of 12,000", "configuration of arm.none", "side over sid_ngram",
        "arms ran apart", "cross-entropy", "48.7 %",
    ):  # fmt: skip
        assert expected in text, expected
    assert "configuration of dataset" not in text


def test_page_escapes_what_it_was_given() -> None:
    text = page(origin="<script>alert(1)</script>")
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_learning_curve_is_the_training_ne_of_the_task() -> None:
    curve: Curve = [(1.0, 0.5)]
    curves: dict[str, Curve] = {
        "test_click_ne": [(9.0, 0.4)], "train_click_loss": [], "train_click_ne": curve,
        "train_conversion_ne": [(2.0, 0.9)], "learning_rate": [],
    }  # fmt: skip
    assert learning_curve(curves, "click") == curve
    assert learning_curve({"train_click_late_ne": curve}, "click") == []  # of a task whose name begins alike


def test_curves_leave_out_what_is_null(tmp_path: Path) -> None:
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


def test_tables_that_arms_share_are_told_once_and_those_of_sids_arm_by_arm() -> None:
    block = tables_block(comparison())
    assert block.columns == ("table", "possible ids", "ids seen", "rows", "share a row", "never seen", "bytes")
    assert block.rows == (
        ("every arm", "user_id", "2,469", "2,300", "2,469", "", "0.50%", "309 KiB"),
        ("sid_ngram", "item_sid_prefix_10", "59,049", "9,000", "4,096", "88.9%", "12.00%", "512 KiB"),
    )
    assert tables_block(comparison(), only_sids=True).rows == block.rows[1:]
    assert "Embedding tables" in render_page(comparison(), [], {})
