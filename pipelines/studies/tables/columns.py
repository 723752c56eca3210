"""The columns of a paper's table: our measures, and the paper's own figures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from sidestack.pipelines.report.blocks import NO_DIFFERENCE, mark_of
from sidestack.pipelines.report.comparison import ArmResult, Comparison, Gain
from sidestack.pipelines.report.units import byte_size, percent, percent_interval
from sidestack.pipelines.report.verdict import verdict_between
from sidestack.pipelines.studies.tables.config import TableConfig
from sidestack.ranker.metric_registry import HEADLINE, Metric, all_metrics

UNKNOWN = ""


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: the heading. cell: returns the text for an arm.
    """

    title: str
    cell: Callable[[str], str]


def measured_columns(table: TableConfig, comparison: Comparison) -> list[Column]:
    """Return the columns of our measures: cost, and every task by the table's metric.

    Return on investment is defined for the headline metric, so cost and return are shown only with it; with any other
    metric its values are shown instead.
    """
    ours = _Measured(table, comparison)
    arm = [Column("arm", str), Column("bytes a row", ours.bytes_a_row)]
    storage = [Column("storage", ours.storage)] if table.storage_over else []
    tasks = [column for task in comparison.tasks for column in _task_columns(ours, task)]
    if ours.metric != HEADLINE:
        return [*arm, *storage, *tasks]
    return [*arm, Column("cost", ours.cost), *storage, *tasks, Column("RoI", ours.roi)]


def _task_columns(ours: "_Measured", task: str) -> list[Column]:
    title = f"{task} {ours.metric.title}"
    value = [Column(title, partial(ours.value, task))] if ours.metric != HEADLINE else []
    interval = f"{100 * ours.comparison.confidence:g} %"
    gain = [Column(f"{title} gain", partial(ours.gain, task)), Column(interval, partial(ours.interval, task))]
    of_dense = [Column("of dense", partial(ours.of_dense, task))] if ours.table.storage_over else []
    return [*value, *gain, *of_dense]


@dataclass(frozen=True)
class _Measured:
    """Cells of our measures, by arm and task."""

    table: TableConfig
    comparison: Comparison

    @property
    def metric(self) -> Metric:
        return all_metrics()[self.table.metric]

    def bytes_a_row(self, arm: str) -> str:
        return byte_size(self.comparison.arms[arm].feature_bytes_per_row)

    def cost(self, arm: str) -> str:
        bytes_a_row = self.comparison.arms[arm].feature_bytes_per_row
        return _times(bytes_a_row / self._first.feature_bytes_per_row) if self._first and bytes_a_row else UNKNOWN

    def roi(self, arm: str) -> str:
        """Return an arm's return relative to the first arm's, as in the paper; empty if the first has none.

        It is marked if neither arm's gain is shown on any task: it is then a ratio of noise.
        """
        result, first = self.comparison.arms[arm], self._first
        if result.roi is None or first is None or not first.roi or first.roi < 0:
            return UNKNOWN
        times = _times(result.roi / first.roi)
        shown = all(_is_shown(one, self.comparison.reference) for one in (result, first))
        return times if shown else f"{times} {NO_DIFFERENCE}"

    @property
    def _first(self) -> ArmResult | None:
        return next((arm for arm in self.comparison.arms.values() if arm.feature_bytes_per_row), None)

    def storage(self, arm: str) -> str:
        bytes_a_row = self.comparison.arms[arm].feature_bytes_per_row
        dense = self.table.storage_over.get(arm)
        if dense is None or not bytes_a_row:
            return UNKNOWN
        return _smaller(self.comparison.arms[dense].feature_bytes_per_row / bytes_a_row)

    def value(self, task: str, arm: str) -> str:
        return self.metric.text(self.comparison.arms[arm].tasks[task].metrics[self.metric.name].value)

    def gain(self, task: str, arm: str) -> str:
        if arm == self.comparison.reference:
            return "reference"
        gain = self._gain(task, arm)
        verdict = verdict_between(self.comparison, task, arm, self.comparison.reference, self.table.metric)
        if gain is None or verdict is None:
            return "undefined"
        return f"{percent(gain.gain)} {mark_of(verdict)}".rstrip()

    def interval(self, task: str, arm: str) -> str:
        gain = self._gain(task, arm)
        return percent_interval(gain.interval) if gain else UNKNOWN

    def of_dense(self, task: str, arm: str) -> str:
        """Return an arm's gain relative to that of its dense arm; empty if the dense arm's gain is not shown."""
        dense = self.table.storage_over.get(arm)
        if dense is None:
            return UNKNOWN
        gain, whole = self._gain(task, arm), self._gain(task, dense)
        if gain is None or whole is None or whole.interval[0] <= 0:
            return UNKNOWN
        return f"{100 * gain.gain / whole.gain:.0f} %"

    def _gain(self, task: str, arm: str) -> Gain | None:
        """Return the gain over the reference by the table's metric."""
        return self.comparison.arms[arm].tasks[task].gain(self.metric.name, self.comparison.reference)


def _is_shown(arm: ArmResult, reference: str) -> bool:
    """Return whether the headline gain of any task is shown to differ from 0."""
    gains = [result.gain(HEADLINE.name, reference) for result in arm.tasks.values()]
    return any(gain is not None and not gain.holds_zero for gain in gains)


def paper_columns(table: TableConfig) -> list[Column]:
    """Return the columns of the paper's own figures, those that it has for any arm."""
    paper, title = table.paper, all_metrics()[table.metric].title
    columns = [
        _paper_column("cost", {arm: given.cost for arm, given in paper.items()}, "x{:g}".format),
        _paper_column("storage", {arm: given.storage for arm, given in paper.items()}, _smaller),
    ]
    for task in dict.fromkeys(task for given in paper.values() for task in given.gains):
        gains = {arm: given.gains.get(task) for arm, given in paper.items()}
        columns.append(_paper_column(f"{task} {title} gain", gains, _per_cent))
    columns += [
        _paper_column(f"{title} gain", {arm: given.gain for arm, given in paper.items()}, _per_cent),
        _paper_column("RoI", {arm: given.roi for arm, given in paper.items()}, "x{:g}".format),
    ]
    return [column for column in columns if column is not None]


def _paper_column(title: str, figures: Mapping[str, float | None], text: Callable[[float], str]) -> Column | None:
    texts = {arm: text(number) for arm, number in figures.items() if number is not None}
    return Column(f"paper: {title}", lambda arm: texts.get(arm, UNKNOWN)) if texts else None


def _per_cent(number: float) -> str:
    return f"{number:+g} %"


def _times(ratio: float) -> str:
    """Return a ratio as text, with two digits if it is far from 1."""
    if abs(ratio) >= 100:
        return f"x{ratio:,.0f}"
    return f"x{ratio:.2f}" if abs(ratio) >= 0.1 else f"x{ratio:.2g}"


def _smaller(times: float) -> str:
    return f"x{times:,.0f} smaller" if times >= 10 else f"x{times:.1f} smaller"
