"""Gates: each compares one figure with its bounds; its state is open, closed, or no verdict for lack of data."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sidestack.pipelines.retrain.config import GatesConfig
from sidestack.pipelines.retrain.ledger import Gate


class Judged(NamedTuple):
    """Measures of a task on the judged dates.

    Attributes:
        rows: judged rows. positives, users: among them. ne, calibration: the candidate's; None if not defined.
        gain: over the champion, with its interval; None without a champion, or if not defined.
    """

    rows: int
    positives: int
    users: int
    ne: float | None
    calibration: float | None
    gain: tuple[float, float, float] | None


def task_gates(
    config: GatesConfig, judged: Mapping[str, Judged], roots: Iterable[str], has_champion: bool
) -> list[Gate]:
    """Return the gates of the deciding tasks.

    Args:
        config: the bounds. judged: by task. roots: tasks without a parent, which decide by default.
        has_champion: whether there is a champion to compare with.
    """
    deciding = tuple(roots) if config.tasks is None else config.tasks
    found = [gate for task in deciding for gate in _of_task(config, task, judged.get(task), has_champion)]
    others = {task: one for task, one in judged.items() if task not in deciding}
    return found + [
        _harm_gate(config, task, one) for task, one in others.items() if one.gain and _is_enough(config, one)
    ]


def _is_enough(config: GatesConfig, judged: Judged) -> bool:
    return judged.positives >= config.min_positives and judged.users >= config.min_users


def _harm_gate(config: GatesConfig, task: str, judged: Judged) -> Gate:
    """Return the gate of a non-deciding task: closed if the task is shown to be worse."""
    assert judged.gain is not None
    value, low, high = judged.gain
    return Gate(
        name=f"harm {task}",
        verdict="open" if high >= -config.max_loss else "closed",
        figure=high,
        rule=f"upper end at least {-config.max_loss:+.2%}",
        why=f"NE gain over the champion {value:+.2%} ({low:+.2%} to {high:+.2%})",
    )


def _of_task(config: GatesConfig, task: str, judged: Judged | None, has_champion: bool) -> list[Gate]:
    rule = f"{config.min_positives} positives and {config.min_users} users at least"
    if judged is None:
        return [Gate(name=f"rows {task}", verdict="no verdict", rule=rule, why="no date with mature labels is judged")]
    counts = f"{judged.rows:,} rows, {judged.positives:,} positives, {judged.users:,} users"
    is_enough = _is_enough(config, judged)
    rows = Gate(
        name=f"rows {task}",
        verdict="open" if is_enough else "no verdict",
        figure=judged.positives,
        rule=rule,
        why=counts,
    )
    if not is_enough:
        return [rows]
    found = [
        rows,
        _bounded(
            f"NE {task}", judged.ne, judged.ne is not None and judged.ne < config.max_ne, f"below {config.max_ne:g}"
        ),
        _bounded(
            f"calibration {task}",
            judged.calibration,
            judged.calibration is not None and config.calibration.holds(judged.calibration),
            str(config.calibration),
        ),
    ]
    if has_champion:
        found.append(_gain_gate(config, task, judged.gain))
    return found


def _gain_gate(config: GatesConfig, task: str, gain: tuple[float, float, float] | None) -> Gate:
    rule = f"lower end at least {-config.max_loss:+.2%}"
    if gain is None:
        return Gate(name=f"gain {task}", verdict="no verdict", rule=rule, why="the gain is not defined")
    value, low, high = gain
    why = f"NE gain over the champion {value:+.2%} ({low:+.2%} to {high:+.2%})"
    return Gate(
        name=f"gain {task}", verdict="open" if low >= -config.max_loss else "closed", figure=low, rule=rule, why=why
    )


def _bounded(name: str, figure: float | None, is_inside: bool, rule: str) -> Gate:
    if figure is None:
        return Gate(name=name, verdict="no verdict", rule=rule, why="is not defined on the judged rows")
    return Gate(name=name, verdict="open" if is_inside else "closed", figure=figure, rule=rule)


def drift_gates(config: GatesConfig, figures: Mapping[str, float]) -> list[Gate]:
    """Return the gates of drift figures; none in a first cycle, which has no figures.

    Args:
        config: the bounds. figures: by name; empty in a first cycle.
    """
    if not figures:
        return []
    found = []
    for name, bounds in config.drift.items():
        figure = figures.get(name)
        if figure is None:
            found.append(Gate(name=name, verdict="no verdict", rule=str(bounds), why="was not measured"))
        else:
            found.append(_bounded(name, figure, bounds.holds(figure), str(bounds)))
    return found


def may_promote(gates: Iterable[Gate]) -> bool:
    """Return whether every gate is open."""
    return all(gate.verdict == "open" for gate in gates)
