"""The report's figures, drawn of a comparison written by hand."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sidestack.pipelines.report.drawing import DARK, LIGHT, Plot, Theme, arm_colors, render
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.figures_learning import _spread
from tests.pipelines.small_comparison import CLICK, CURVES, all_plots, comparison, unjudged


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
