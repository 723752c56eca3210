"""`python -m pipelines.studies.sweep --config FILE --bits 24 [--levels 2 3 4 8] [--set section.key=value] [--parity]`.

The parameter sweep of SIDE 6.1.2: train an encoder for each (levels, depth, groups) within a budget of bits, compare
them, and choose the one with the lowest loss. With `--parity`, rankers compare it with the configuration's own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sidestack.infra.config import parse, plain
from sidestack.infra.manifest import is_committed
from sidestack.pipelines.config import read_config
from sidestack.pipelines.graph import stages
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.report.units import percent, percent_interval
from sidestack.pipelines.report.verdict import verdict_between
from sidestack.pipelines.run import command_line, exit_status, relative_to_cwd, run_stages
from sidestack.pipelines.studies.sweep.choose import CHOSEN_FILE, PICTURE_FILE, RESULT_FILE, TABLE_FILE
from sidestack.pipelines.studies.sweep.grid import LEVELS, Budget
from sidestack.pipelines.studies.sweep.plan import CHOSEN, SIDE, parity_overrides, sweep_stages
from sidestack.pipelines.studies.sweep.result import SweepResult
from sidestack.ranker.metric_registry import HEADLINE


def sweep(config_file: Path, overrides: Sequence[str], budget: Budget) -> Path:
    """Train an encoder for each setting of a budget, and choose the best.

    Returns:
        the committed directory of the choice.

    Raises:
        SidestackError: see `pipelines.run.run_pipeline`; or the budget allows no setting.
        StopSignal: a signal came.
    """
    values, config = read_config(config_file, overrides)
    plan = sweep_stages(config, budget)
    encoders = [stage for stage in plan if stage.name == "encoder"]
    log_line("sweep", f"{len(encoders)} settings of up to {budget.bits:g} bits")
    return run_stages(plan, config.run, values, {**plain(config), "sweep": plain(budget)}, "sweep")


def check_parity(config_file: Path, overrides: Sequence[str], found: SweepResult) -> Path | None:
    """Compare the chosen setting with the configuration's own by training rankers.

    Returns:
        the comparison's committed directory; None if the two settings are equal.

    Raises:
        SidestackError, StopSignal: see `sweep`.
    """
    chosen = found.chosen.setting
    if chosen == found.own:
        return None
    _, config = read_config(config_file, overrides)
    values, contest = read_config(config_file, [*overrides, *parity_overrides(config, chosen)])
    return run_stages(stages(contest), contest.run, values, plain(contest), "parity")


def parity_text(comparison: Comparison) -> str:
    """Return the rankers' result with the chosen setting, one line per task."""
    title = HEADLINE.title
    lines = [f"parity: {title} with the chosen setting over {title} with the configuration's own"]
    chosen, own = comparison.arms[CHOSEN], comparison.arms[SIDE]
    width = max(map(len, chosen.tasks))
    for task, result in chosen.tasks.items():
        gain, verdict = result.gain(HEADLINE.name, SIDE), verdict_between(comparison, task, CHOSEN, SIDE)
        if gain is None or verdict is None:
            lines.append(f"  {task:<{width}}  undefined on these rows")
            continue
        values = ", ".join(HEADLINE.text(one.metrics[HEADLINE.name].value) for one in (result, own.tasks[task]))
        measured = f"gain {percent(gain.gain)} ({percent_interval(gain.interval)})"
        lines.append(f"  {task:<{width}}  {values}: {measured}: {verdict.words}")
    return "\n".join(lines)


def _print_result(found: Path) -> None:
    print((found / TABLE_FILE).read_text(encoding="utf-8"))
    for what, file in (("heat map", PICTURE_FILE), ("chosen", CHOSEN_FILE), ("all", RESULT_FILE)):
        print(f"{what:<9}{relative_to_cwd(found / file)}")


def _run(arguments: argparse.Namespace) -> None:
    budget = parse(Budget, {"bits": arguments.bits, "levels": arguments.levels or ()}, "sweep")
    found = sweep(arguments.config, arguments.set, budget)
    _print_result(found)
    if not arguments.parity:
        return
    result = SweepResult.model_validate_json((found / RESULT_FILE).read_bytes())
    compared = check_parity(arguments.config, arguments.set, result)
    if compared is None:
        print("parity: the chosen setting is the configuration's own")
        return
    assert is_committed(compared)
    print(f"\n{(compared / 'table.txt').read_text(encoding='utf-8')}")
    print(parity_text(Comparison.read(compared)))
    print(f"report   {relative_to_cwd(compared / 'report.html')}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error, 128 + the signal's number after a signal.
    """
    parser = command_line("pipelines.studies.sweep", "Sweep levels, depth and groups of the SID.")
    parser.add_argument("--bits", type=float, default=24.0, help="the most bits of a SID; default 24")
    parser.add_argument("--levels", type=int, nargs="+", help=f"levels to try; default: of {LEVELS} those that fit")
    parser.add_argument("--parity", action="store_true", help="compare the chosen setting in the ranker, too")
    arguments = parser.parse_args(argv)
    with exit_status():
        _run(arguments)


if __name__ == "__main__":
    main()
