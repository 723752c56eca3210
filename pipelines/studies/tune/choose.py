"""Stage `tune`: choose for each arm the setting that is best on the validation dates.

Inputs are the trainings of all rungs so far (`--input arm.<rung>.<arm>.<setting>=DIR`). The output is `tune.json`, and
the best of each arm as a table. The best setting has the best product of the tasks' headline metrics (the lowest, for
normalized entropy) in the last rung, so that one per cent of any task counts the same.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from sidestack.infra.config import Config
from sidestack.infra.errors import DataError
from sidestack.infra.record import SUMMARY_FILE
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tables import read_json
from sidestack.pipelines.studies.tune.config import INPUT, LearningRates, TuneConfig
from sidestack.ranker.metric_registry import HEADLINE

RESULT_FILE, TABLE_FILE = "tune.json", "table.txt"


class Trial(Config):
    """One arm with one setting in one rung, on the validation dates."""

    arm: str
    setting: LearningRates
    rung: int = 0
    """Counted from 0."""
    steps: int = 0
    seconds: float = 0.0
    """Duration of the training, without the untimed first steps."""
    values: dict[str, float]
    """Headline metric by task."""

    @property
    def score(self) -> float:
        """Sum of the logarithms of the tasks' values, with the sign for which lower is better."""
        total = sum(math.log(value) for value in self.values.values())
        return total if HEADLINE.better == "lower" else -total


class Tuned(Config):
    """All trials, and the data on which they were compared."""

    held_out: tuple[str, str]
    """First and last validation date."""
    trials: tuple[Trial, ...]

    @property
    def ranked(self) -> dict[str, list[Trial]]:
        """Arm -> the trials of the last rung, best first."""
        last = max(trial.rung for trial in self.trials)
        trials = sorted((one for one in self.trials if one.rung == last), key=lambda one: one.score)
        arms = dict.fromkeys(trial.arm for trial in self.trials)
        return {arm: [one for one in trials if one.arm == arm] for arm in arms}

    @property
    def best(self) -> dict[str, Trial]:
        """Arm -> its best trial."""
        return {arm: trials[0] for arm, trials in self.ranked.items()}

    @property
    def better_half(self) -> dict[str, list[LearningRates]]:
        """Arm -> the settings of the next rung."""
        return {arm: [one.setting for one in trials[: -(-len(trials) // 2)]] for arm, trials in self.ranked.items()}


def choose(run: StageRun[TuneConfig]) -> None:
    """Read every training's measures, choose for each arm, and write the outputs; only rank 0 works.

    Raises:
        DataError: an input was not measured on validation dates, or a task is not defined on them.
    """
    if not run.world.is_main:
        return
    read = [_trial(run.config, name, path) for name, path in run.inputs.items()]
    dates = {held_out for _, held_out in read}
    if len(dates) > 1:
        raise DataError(f"tune: the trainings are measured on different dates: {sorted(dates)}")
    tuned = Tuned(held_out=dates.pop(), trials=tuple(trial for trial, _ in read))
    (run.out / RESULT_FILE).write_text(tuned.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (run.out / TABLE_FILE).write_text(as_text(tuned, run.config), encoding="utf-8")
    chosen = {arm: best.setting.model_dump() for arm, best in tuned.best.items()}
    cost = {"trainings": len(tuned.trials), "seconds": sum(trial.seconds for trial in tuned.trials)}
    run.log.summary({**chosen, "cost": cost})


def _trial(config: TuneConfig, name: str, path: Path) -> tuple[Trial, tuple[str, str]]:
    rung, _, rest = name.removeprefix(INPUT).partition(".")
    tried = next((one for one in config.settings() if rest.endswith(f".{one.name}")), None)
    arm = rest.removesuffix(f".{tried.name}") if tried is not None else rest
    summary: dict[str, Any] = read_json(path / SUMMARY_FILE)
    tasks = {task: measured[HEADLINE.name] for task, measured in summary.get("tasks", {}).items()}
    if tried is None or summary.get("arm") != arm or not tasks:
        raise DataError(f"{path}: is no training of the arm {arm!r} with a setting of the grid")
    for task, value in tasks.items():
        if value is None:
            raise DataError(f"{path}: {HEADLINE.title} of {task} is not defined on the validation dates")
    first, last = summary["dates"]["held_out"]
    took = {"steps": summary["steps"], "seconds": summary["train_seconds"]}
    return Trial(arm=arm, setting=tried, rung=int(rung), values=tasks, **took), (first, last)


def as_text(tuned: Tuned, config: TuneConfig) -> str:
    """Return the chosen settings as a table, with a note if one is at the grid's edge."""
    first, last = tuned.held_out
    each = len(list(config.settings()))
    width = max(len(arm) for arm in tuned.best)
    heads = [f"{task} {HEADLINE.title}" for task in tuned.trials[0].values]
    lines = [
        f"{each} settings an arm, on {first} to {last}",
        f"cost: {_cost(tuned, config)}",
        "",
        "  ".join([f"{'arm':<{width}}", "sparse", "dense ", *heads]),
    ]
    for arm, best in tuned.best.items():
        edges = ", ".join(_edges(best.setting, config))
        note = f"  (at the grid's edge: {edges})" if edges else ""
        cells = (
            f"{arm:<{width}}",
            f"{best.setting.sparse_learning_rate:<6g}",
            f"{best.setting.dense_learning_rate:<6g}",
            *(f"{HEADLINE.text(value):>{len(head)}}" for head, value in zip(heads, best.values.values(), strict=True)),
        )
        lines.append("  ".join(cells) + note)
    return "\n".join([*lines, ""])


def _cost(tuned: Tuned, config: TuneConfig) -> str:
    """Return the total cost of the search, over arms and rungs, as text."""
    assert config.rungs is not None
    numbers = Counter(trial.rung for trial in tuned.trials)
    trainings = ", ".join(f"{number} of {config.rungs[rung]:.3g}" for rung, number in sorted(numbers.items()))
    steps, seconds = (sum(getattr(trial, name) for trial in tuned.trials) for name in ("steps", "seconds"))
    return f"trainings, by their share of the steps: {trainings}; {steps:,} steps, {seconds:,.0f} s"


def _edges(setting: LearningRates, config: TuneConfig) -> list[str]:
    grids = {"sparse": config.sparse_learning_rates, "dense": config.dense_learning_rates}
    chosen = {"sparse": setting.sparse_learning_rate, "dense": setting.dense_learning_rate}
    return [name for name, grid in grids.items() if len(grid) > 1 and chosen[name] in (min(grid), max(grid))]


if __name__ == "__main__":
    run_stage("tune", "tune", TuneConfig, (f"{INPUT}*",), choose)
