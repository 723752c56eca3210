"""Human-readable tables of retraining."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table

from sidestack.infra.console import FILE_WIDTH
from sidestack.pipelines.retrain.ledger import Cycle, Gate, Ledger


def gate_table(gates: Sequence[Gate]) -> str:
    """Return one line per gate: its name, the measured figure, the required bounds."""
    rows = [(gate.name, gate.verdict, _number(gate.figure), gate.rule, gate.why) for gate in gates]
    return _text(("gate", "verdict", "figure", "must be", ""), rows)


def status_table(ledger: Ledger) -> str:
    """Return one line per cycle: training dates, judged dates, and whether it was promoted."""
    if not ledger.cycles:
        return "no cycle yet"
    champion = ledger.champions[-1] if ledger.champions else None
    rows = [_cycle_row(cycle, is_champion=cycle.plan.number == champion) for cycle in ledger.cycles]
    names = ("cycle", "decided", "policy", "from", "learned to", "judged on", "NE gain", "result", "seconds", "")
    return _text(names, rows)


def _cycle_row(cycle: Cycle, is_champion: bool) -> tuple[str, ...]:
    plan, outcome = cycle.plan, cycle.outcome
    begun = (str(plan.number), f"{plan.at:%Y-%m-%d %H:%M}")
    from_version = "" if plan.champion is None else str(plan.champion)
    if plan.kind == "rollback":
        return (*begun, "rollback", "", "", "", "", f"champion is {from_version}", "", plan.why)
    learned = max((f"{last}" for _, last in plan.learned.values()), default="")
    judged = next((f"{first}" if first == last else f"{first} to {last}" for first, last in plan.measured.values()), "")
    if outcome is None:
        return (*begun, plan.policy, from_version, learned, judged, "", "under way", "", plan.why)
    suffix = "_gain"
    gains = {name.removesuffix(suffix): value for name, value in outcome.figures.items() if name.endswith(suffix)}
    closed = [f"{gate.name}: {gate.verdict}" for gate in outcome.gates if gate.verdict != "open"]
    result = "promoted" if outcome.promoted else "not promoted" if outcome.candidate else "nothing trained"
    gains_text = ", ".join(f"{task} {gain:+.2%}" for task, gain in gains.items())
    return (
        *begun, plan.policy, from_version, learned, judged, gains_text,
        "champion" if is_champion else result, f"{sum(outcome.seconds.values()):.0f}", ", ".join(closed),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _text(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = Table(*names, box=None, pad_edge=False, header_style="")
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=FILE_WIDTH, highlight=False, color_system=None)
    console.print(table)
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
