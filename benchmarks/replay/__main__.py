"""`python -m benchmarks.replay`: replay a log week by week with each retraining policy, and compare quality and cost.

Prepared data and trained models are kept below `--cache` and `--runs`, so an interrupted replay resumes. Ctrl-C stops
it.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from sidestack.benchmarks.record import print_table, results_folder, write_results
from sidestack.benchmarks.replay.figures import draw_cost, draw_replay
from sidestack.benchmarks.replay.measures import growth, summary
from sidestack.benchmarks.replay.page import (
    GROWTH_COLUMNS,
    PACKAGES,
    POLICY_COLUMNS,
    TITLE,
    as_markdown,
    growth_rows,
    policy_rows,
    verdict,
)
from sidestack.benchmarks.replay.run import Span, first_champion, prepare_replay, replay, run_bytes
from sidestack.pipelines.config import read_config
from sidestack.pipelines.retrain.config import PolicyName
from sidestack.pipelines.run import exit_status

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """The extent of a replay.

    Attributes:
        config: the log and the models. span: how much of the log. policies: the cost of the first one is fitted.
    """

    config: Path
    span: Span
    policies: tuple[PolicyName, ...]


FULL = Scale(_HERE / "complete_journey.yaml", Span(users=0.25, learned=8), get_args(PolicyName))
QUICK = Scale(_HERE / "quick.yaml", Span(users=0.8, learned=2), ("append", "never"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark.

    Raises:
        SystemExit: 1 after an error that the user can fix.
    """
    arguments = _parse(argv)
    with exit_status():
        _run(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__)
    add = parser.add_argument
    add("--cache", type=Path, default=Path(".cache/replay"), help="keeps the prepared log")
    add("--runs", type=Path, default=Path("runs/benchmarks/replay"), help="keeps what is trained")
    add("--out", type=Path, help="directory of replay.json, replay.md and pictures")
    add("--cycles", type=int, help="the most after the first champion; default: all that the log has")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="policies at once, a thread each")
    add("--set", action="append", default=[], metavar="A.B=C", help="override a setting of the log or the models")
    add("--quick", action="store_true", help="a small synthetic log, two policies: does it run at all")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    scale = QUICK if arguments.quick else FULL
    span = Span(scale.span.users, scale.span.learned, arguments.cycles)
    _, given = read_config(scale.config, arguments.set)
    config, as_ofs, origin = prepare_replay(given, span, arguments.cache, arguments.runs)
    first_champion(config, as_ofs[0])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda policy: replay(config, policy, as_ofs), scale.policies))
    rows = [row for of_policy in found for row in of_policy]
    lines = [summary(rows, policy, run_bytes(config, policy)) for policy in scale.policies]
    costed = scale.policies[0]
    fits = growth(rows, costed)
    print_table(TITLE, policy_rows(lines), POLICY_COLUMNS)
    print_table(f"cost of {costed}", growth_rows(fits), GROWTH_COLUMNS)
    print(verdict(lines, fits, costed))
    out = results_folder(arguments.out, quick=arguments.quick)
    written = write_results("replay", rows, packages=PACKAGES, out=out)
    draw_replay(rows, scale.policies, out / "replay.png")
    draw_cost(rows, costed, fits, scale.policies, out / "replay_cost.png")
    pictures = {
        "replay.png": "Served NE, gains, drift by week; a filled point is a cycle that promoted its candidate",
        "replay_cost.png": "CPU seconds of a cycle by the impressions of the log",
    }
    facts = {"origin": origin, "users": span.users, "learned": span.learned, "settings": scale.config.name}
    page = as_markdown(config, facts, rows, lines, fits, costed, pictures)
    (out / "replay.md").write_text(page, encoding="utf-8")
    print(f"{written}\n{out / 'replay.md'}")


if __name__ == "__main__":
    main()
