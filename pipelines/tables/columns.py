"""The columns of a paper's table: what we measured, and the paper's own figures."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from infra.tables import TASKS
from pipelines.report.blocks import NO_DIFFERENCE
from pipelines.report.comparison import ArmResult, Comparison, holds_zero
from pipelines.report.units import byte_size, percent, percent_interval
from pipelines.tables.config import PaperFigures, TableConfig

UNKNOWN = ""


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: heads it. cell: gives its text for an arm.
    """

    title: str
    cell: Callable[[str], str]


def measured_columns(table: TableConfig, comparison: Comparison) -> list[Column]:
    """Give what we measured of each arm: its cost, and both tasks by the table's metric."""
    ours = _Measured(table, comparison)
    arm = [Column("arm", str), Column("bytes a row", ours.bytes_a_row)]
    storage = [Column("storage", ours.storage)] if table.storage_over else []
    tasks = [column for task in TASKS for column in _task_columns(ours, task)]
    if table.metric == "auc":
        return [*arm, *storage, *tasks]
    return [*arm, Column("cost", ours.cost), *storage, *tasks, Column("RoI", ours.roi)]


def _task_columns(ours: "_Measured", task: str) -> list[Column]:
    auc = [Column(f"{task} AUC", partial(ours.auc, task))] if ours.table.metric == "auc" else []
    title = f"{task} {ours.table.metric.upper()} gain"
    gain = [Column(title, partial(ours.gain, task)), Column("95 %", partial(ours.interval, task))]
    of_dense = [Column("of dense", partial(ours.of_dense, task))] if ours.table.storage_over else []
    return [*auc, *gain, *of_dense]


@dataclass(frozen=True)
class _Measured:
    """The cells of what we measured, by arm and task."""

    table: TableConfig
    comparison: Comparison

    def bytes_a_row(self, arm: str) -> str:
        return byte_size(self.comparison.arms[arm].feature_bytes_per_row)

    def cost(self, arm: str) -> str:
        bytes_a_row = self.comparison.arms[arm].feature_bytes_per_row
        return _times(bytes_a_row / self._first.feature_bytes_per_row) if self._first and bytes_a_row else UNKNOWN

    def roi(self, arm: str) -> str:
        """Give an arm's return over the first one's, as the paper does; none where the first has none to divide by.

        It is marked where no task's gain of either arm is shown: it then divides noise.
        """
        result, first = self.comparison.arms[arm], self._first
        if result.roi is None or first is None or not first.roi or first.roi < 0:
            return UNKNOWN
        times = _times(result.roi / first.roi)
        return times if _is_shown(result) and _is_shown(first) else f"{times} {NO_DIFFERENCE}"

    @property
    def _first(self) -> ArmResult | None:
        return next((arm for arm in self.comparison.arms.values() if arm.feature_bytes_per_row), None)

    def storage(self, arm: str) -> str:
        bytes_a_row = self.comparison.arms[arm].feature_bytes_per_row
        dense = self.table.storage_over.get(arm)
        if dense is None or not bytes_a_row:
            return UNKNOWN
        return _smaller(self.comparison.arms[dense].feature_bytes_per_row / bytes_a_row)

    def auc(self, task: str, arm: str) -> str:
        auc = self.comparison.arms[arm].tasks[task].auc
        return UNKNOWN if auc is None else f"{auc:.4f}"

    def gain(self, task: str, arm: str) -> str:
        if arm == self.comparison.reference:
            return "reference"
        gain, bounds = self._estimate(task, arm)
        if gain is None:
            return "undefined"
        return f"{percent(gain)} {NO_DIFFERENCE}" if bounds and holds_zero(bounds) else percent(gain)

    def interval(self, task: str, arm: str) -> str:
        _, bounds = self._estimate(task, arm)
        return percent_interval(bounds) if bounds else UNKNOWN

    def of_dense(self, task: str, arm: str) -> str:
        """Give an arm's gain over that of its dense arm; none where no gain of the dense arm is shown."""
        dense = self.table.storage_over.get(arm)
        if dense is None:
            return UNKNOWN
        (gain, _), (whole, bounds) = self._estimate(task, arm), self._estimate(task, dense)
        if gain is None or whole is None or bounds is None or bounds[0] <= 0:
            return UNKNOWN
        return f"{100 * gain / whole:.0f} %"

    def _estimate(self, task: str, arm: str) -> tuple[float | None, tuple[float, float] | None]:
        """Give the gain over the reference by the table's metric, and its interval."""
        result = self.comparison.arms[arm].tasks[task]
        if self.table.metric == "auc":
            return result.auc_gain, result.auc_gain_interval
        return result.ne_gain, result.ne_gain_interval


def _is_shown(arm: ArmResult) -> bool:
    """Say whether the NE gain of any task differs from 0."""
    intervals = [result.ne_gain_interval for result in arm.tasks.values() if result.ne_gain is not None]
    return any(bounds is None or not holds_zero(bounds) for bounds in intervals)


def paper_columns(table: TableConfig) -> list[Column]:
    """Give the paper's own figures of each arm; no columns where the table is of no paper."""
    if not table.paper:
        return []

    def column(title: str, figure: Callable[[PaperFigures], float | None], text: Callable[[float], str]) -> Column:
        def cell(arm: str) -> str:
            number = figure(table.paper.get(arm, PaperFigures()))
            return UNKNOWN if number is None else text(number)

        return Column(f"paper: {title}", cell)

    if table.metric == "auc":
        return [
            column("storage", lambda given: given.storage, _smaller),
            column("AUC gain", lambda given: given.auc, "{:+.3f} %".format),
        ]
    return [
        column("cost", lambda given: given.cost, "x{:g}".format),
        column("click NE gain", lambda given: given.click, "{:+.4f} %".format),
        column("conversion NE gain", lambda given: given.conversion, "{:+.4f} %".format),
        column("RoI", lambda given: given.roi, "x{:g}".format),
    ]


def _times(ratio: float) -> str:
    """Tell a ratio, to two digits where it is far from 1."""
    if abs(ratio) >= 100:
        return f"x{ratio:,.0f}"
    return f"x{ratio:.2f}" if abs(ratio) >= 0.1 else f"x{ratio:.2g}"


def _smaller(times: float) -> str:
    return f"x{times:,.0f} smaller" if times >= 10 else f"x{times:.1f} smaller"
