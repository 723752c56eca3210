"""The page of `make chaos`: injected faults, whether the runs survived, and the cost, from the tests' JUnit report.

`python -m benchmarks.reliability REPORT.xml... [--out DIR]`. If a test is in several reports, the last one counts. A
test with marker ``chaos`` adds these to the report by pytest's `record_property`: ``fault``, the fault that it injects;
``faults``, their number (1); ``seconds`` and ``measure``, a time and what it measures; ``steps_lost``, the maximum
number of repeated steps.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple
from xml.etree import ElementTree

from sidestack.benchmarks.record import RESULTS, Row, markdown_table, print_table, source, write_results

COLUMNS = {
    "fault": "", "tried": "d", "survived": "d", "median_s": ",.1f", "most_s": ",.1f", "seconds_of": "",
    "steps_lost": "d",
}  # fmt: skip
WORDS = """
Each fault is injected into a real run on this machine, and the run is held against one that nothing disturbed: the same
bytes committed, the same figures, no process left after 30 s, no tracking run left RUNNING.

- `tried`: how often the fault was injected. `survived`: those in tests that passed; one failed check counts all of its
  test's faults as not survived.
- `median_s`, `most_s`: over the tests, seconds of what `seconds_of` says.
- `steps_lost`: the most steps that had to be made again; it follows from how often these runs write checkpoints.
"""


class Case(NamedTuple):
    """One test of the report."""

    fault: str
    faults: int
    passed: bool
    measure: str
    seconds: float | None
    steps_lost: int | None


def cases(reports: Sequence[Path]) -> Iterator[Case]:
    """Yield the tests of JUnit reports that inject a fault; for a test in several reports, the last result."""
    found: dict[tuple[str, str], ElementTree.Element] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314  # written by pytest here
            found[case.get("classname", ""), case.get("name", "")] = case
    for case in found.values():
        properties = {one.get("name", ""): one.get("value", "") for one in case.iter("property")}
        if "fault" in properties:
            passed = not any(case.find(word) is not None for word in ("failure", "error", "skipped"))
            seconds = float(properties["seconds"]) if "seconds" in properties else None
            lost = int(properties["steps_lost"]) if "steps_lost" in properties else None
            yield Case(
                properties["fault"],
                int(properties.get("faults", 1)),
                passed,
                properties.get("measure", ""),
                seconds,
                lost,
            )


def rows(found: Sequence[Case]) -> list[Row]:
    """Return a row for each fault, in the order of the report."""
    of_fault: dict[str, list[Case]] = {}
    for case in found:
        of_fault.setdefault(case.fault, []).append(case)
    return [_row(fault, same) for fault, same in of_fault.items()]


def _row(fault: str, same: Sequence[Case]) -> Row:
    seconds = [case.seconds for case in same if case.seconds is not None]
    lost = [case.steps_lost for case in same if case.steps_lost is not None]
    return {
        "fault": fault,
        "tried": sum(case.faults for case in same),
        "survived": sum(case.faults for case in same if case.passed),
        "median_s": median(seconds) if seconds else None,
        "most_s": max(seconds, default=None),
        "seconds_of": next((case.measure for case in same if case.measure), ""),
        "steps_lost": max(lost, default=None),
    }


def page(table: Sequence[Row]) -> str:
    """Return the page."""
    tried, survived = (sum(row[name] for row in table) for name in ("tried", "survived"))
    head = f"# Reliability: {tried} faults, {survived} survived\n\n{source(('torchrec', 'torchx', 'mlflow'))}\n"
    return f"{head}Made by `make chaos`.\n{WORDS}\n{markdown_table(table, COLUMNS)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.reliability", description="The page of `make chaos`.")
    parser.add_argument("report", type=Path, nargs="+", help="pytest's JUnit report of `-m chaos`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the page")
    arguments = parser.parse_args(argv)
    table = rows(list(cases(arguments.report)))
    print_table("Faults", table, COLUMNS)
    write_results("reliability", table, packages=("torchrec", "torchx", "mlflow"), out=arguments.out)
    (arguments.out / "reliability.md").write_text(page(table), encoding="utf-8")


if __name__ == "__main__":
    main()
