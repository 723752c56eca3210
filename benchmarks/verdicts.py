"""The share of verdicts that are wrong, and that are withheld, on synthetic logs with known truth.

`python -m benchmarks.verdicts [--quick] [--keep DIR] [--out DIR]`. Three arms train on each log, twice each: without
content, with SIDs of content that explains clicks, and with SIDs of the same content exchanged between the items.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, t

from sidestack.benchmarks.contest import (
    ENCODER_EPOCHS,
    NUM_CLUSTERS,
    NUM_SUBCLUSTERS,
    REFERENCE,
    TEST_DAYS,
    TRAIN_DAYS,
    Contest,
    LogSize,
)
from sidestack.benchmarks.goals import PageTable, goal, publish_tables
from sidestack.benchmarks.record import Row, results_folder, write_results
from sidestack.benchmarks.timing import Spread, threads
from sidestack.pipelines.prepare.synthetic import NUM_USER_TYPES
from sidestack.pipelines.report.comparison import Comparison, TaskResult
from sidestack.pipelines.report.verdict import judge
from sidestack.ranker.metric_registry import HEADLINE

REPLICATES = 2
CONFIDENCE = 0.95
CONTENT = {"side": "explains", "side_exchanged": "exchanged"}
"""Arm -> the relation of its content to clicks."""
KINDS = ("better", "worse", "no difference shown", "withheld")
REASONS = {
    "fewer than": "few rows",
    "does not beat the base rate": "not learned",
    "converged": "not converged",
    "overfits": "overfits",
    "undefined": "undefined",
}
"""Part of a reason's text -> its short name."""


class Way(NamedTuple):
    """A way to judge: the number of trainings, and whether doubts about a training or its rows are considered."""

    trainings: int
    doubts: bool

    @property
    def heading(self) -> str:
        """Its display name."""
        number = "Two trainings" if self.trainings == REPLICATES else "One training"
        return f"{number}, {'as reported' if self == REPORTED else 'with doubts' if self.doubts else 'interval alone'}"


REPORTED = Way(REPLICATES, True)
WAYS = (REPORTED, Way(REPLICATES, False), Way(1, True), Way(1, False))


@dataclass(frozen=True)
class Sizes:
    """A size of log, and the number of logs of this size."""

    size: LogSize
    logs: int


FULL = (
    Sizes(LogSize(events=1_000, items=100, users=150), logs=20),
    Sizes(LogSize(events=10_000, items=100, users=200), logs=20),
    Sizes(LogSize(events=10_000, items=1_000, users=200), logs=20),
    Sizes(LogSize(events=100_000, items=10_000, users=2_000), logs=3),
    Sizes(LogSize(events=1_000_000, items=100_000, users=20_000), logs=1),
)
QUICK = (Sizes(LogSize(events=1_000, items=100, users=150), logs=2),)


def main() -> None:
    """Train, judge, print and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small logs, to see that it runs")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="where trainings are kept; those there are not run again"
    )
    parser.add_argument("--out", type=Path, help="where verdicts.json and verdicts.md go")
    arguments = parser.parse_args()
    out = results_folder(arguments.out, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="sidestack-verdicts-") as folder, threads(1):
        found = gains(QUICK if arguments.quick else FULL, arguments.keep or Path(folder))
    write(found, out)


def gains(sizes: Sequence[Sizes], keep: Path) -> list[Row]:
    """Train on every log, and return a row for each gain and way to judge it."""
    found: list[Row] = []
    for place, one in enumerate(sizes):
        for number in range(one.logs):
            seed = 1000 * place + number  # so that no two logs have the same preferences
            for replicates, comparison in contest(keep, one.size, seed).items():
                found += [{**asdict(one.size), "seed": seed, **row} for row in judge_gains(comparison, replicates)]
    return found


def contest(keep: Path, size: LogSize, seed: int) -> dict[int, Comparison]:
    """Train on a log, unless that was done before, and return its comparisons by number of trainings per arm."""
    began = time.perf_counter()
    trained = Contest(keep / f"{size.events}-{size.items}-{seed}", size, seed, REPLICATES)
    found = {number: trained.comparison(number) for number in (REPLICATES, 1)}
    print(f"{size.events:,} events, log {seed}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def judge_gains(comparison: Comparison, trainings: int) -> Iterator[dict[str, Any]]:
    """Yield every gain over the reference, judged with and without doubts."""
    for arm, content in CONTENT.items():
        for task, result in comparison.arms[arm].tasks.items():
            against = (*result.doubts, *comparison.arms[REFERENCE].tasks[task].doubts)
            for way in WAYS:
                if way.trainings == trainings:
                    row = _judge_gain(result, against if way.doubts else ())
                    yield {"content": content, "task": task, **way._asdict(), **row}


def _judge_gain(result: TaskResult, doubts: Sequence[str]) -> dict[str, Any]:
    gain = result.gain(HEADLINE.name, REFERENCE)
    if gain is None:
        return {"gain": None, "low": None, "high": None, "seeds": None, "verdict": "withheld", "why": ["undefined"]}
    verdict = judge(gain, doubts, REPLICATES)  # even one training, as if it were enough to show a difference
    why = sorted({name for words, name in REASONS.items() for reason in verdict.reasons if words in reason})
    low, high = gain.interval
    return {"gain": gain.gain, "low": low, "high": high, "seeds": gain.seeds, "verdict": verdict.kind, "why": why}


class Truth(NamedTuple):
    """The mean gain over logs of one size.

    Attributes:
        mean: of the gains. error: its standard error. kind: the strongest correct verdict; None: not known.
    """

    mean: float
    error: float | None
    kind: str | None


def truth(gains_N: Sequence[float]) -> Truth:
    """Return the mean over logs; `neither` if its Student's t interval includes 0, no kind for a single log."""
    mean = float(np.mean(gains_N))
    if len(gains_N) < 2:
        return Truth(mean, None, None)
    error = float(np.std(gains_N, ddof=1) / np.sqrt(len(gains_N)))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(gains_N) - 1)) * error
    return Truth(mean, error, "neither" if abs(mean) <= half else "better" if mean > 0 else "worse")


Group = tuple[int, int, str, str]
"""Events, items, content and task."""


def groups(rows: Sequence[Row], way: Way) -> dict[Group, list[Row]]:
    """Return the rows of one way to judge, by size, content and task."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        if (row["trainings"], row["doubts"]) == way:
            found.setdefault((row["events"], row["items"], row["content"], row["task"]), []).append(row)
    return found


def truths(rows: Sequence[Row]) -> dict[Group, Truth]:
    """Return the truth of each group, from the gains of all trainings."""
    by_group = groups(rows, REPORTED)
    known = {group: [row["gain"] for row in of if row["gain"] is not None] for group, of in by_group.items()}
    return {group: truth(found) for group, found in known.items() if found}


def truth_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the mean and spread of the gains, over logs and seeds."""
    found: list[Row] = []
    for group, true in truths(rows).items():
        of = [row for row in groups(rows, REPORTED)[group] if row["gain"] is not None]
        over_logs = float(np.std([row["gain"] for row in of], ddof=1)) if len(of) > 1 else None
        seeds = float(np.sqrt(np.mean([row["seeds"] ** 2 for row in of])))
        spreads = {"over_logs": over_logs, "over_seeds": seeds}
        named = {"mean": true.mean, "error": true.error, "true": true.kind}
        found.append({**_named(group), "logs": len(of), **named, **spreads})
    return found


def _named(group: Group) -> dict[str, Any]:
    return dict(zip(("events", "items", "content", "task"), group, strict=True))


def verdict_rows(rows: Sequence[Row], way: Way) -> list[Row]:
    """Count the verdicts of one way to judge, by size, content and task, and overall by content."""
    true = truths(rows)
    by_group = groups(rows, way)
    counted: list[Row] = [
        {**_named(group), **count(of, {group: true[group]})} for group, of in by_group.items() if group in true
    ]
    for content in CONTENT.values():
        of = [row for group, found in by_group.items() if group[2] == content for row in found]
        counted.append({"task": "all", "content": content, **count(of, true)})
    return counted


def count(rows: Sequence[Row], true: dict[Group, Truth]) -> dict[str, Any]:
    """Count verdicts: a shown difference is wrong unless the mean over logs is clearly on its side.

    Shares are of the verdicts that are not withheld and whose truth is known, with Clopper-Pearson bounds.
    """
    counts = Counter(row["verdict"] for row in rows)
    pairs = [(row, true[_group(row)]) for row in rows if _group(row) in true and row["gain"] is not None]
    known = [(row, found) for row, found in pairs if found.kind is not None]
    heard = [(row["verdict"], found.kind) for row, found in known if row["verdict"] != "withheld"]
    wrong = sum(verdict in ("better", "worse") and verdict != kind for verdict, kind in heard)
    holding = [row["low"] <= found.mean <= row["high"] for row, found in known]
    share: dict[str, float | None] = {"wrong_share": None, "wrong_low": None, "wrong_high": None}
    if heard:
        bounds = binomtest(wrong, len(heard)).proportion_ci(CONFIDENCE, "exact")
        share = {"wrong_share": wrong / len(heard), "wrong_low": bounds.low, "wrong_high": bounds.high}
    return {
        "gains": len(rows),
        **{kind: counts[kind] for kind in KINDS},
        "wrong": wrong,
        **share,
        "holds_mean": sum(holding) / len(holding) if holding else None,
    }


def _group(row: Row) -> Group:
    return row["events"], row["items"], row["content"], row["task"]


def reason_rows(rows: Sequence[Row]) -> list[Row]:
    """Count the reasons for withheld verdicts, by size and task; a verdict may have several."""
    found: dict[tuple[int, int, str], list[Row]] = {}
    for (events, items, _, task), of in groups(rows, REPORTED).items():
        found.setdefault((events, items, task), []).extend(of)
    return [
        {
            "events": events, "items": items, "task": task, "gains": len(of),
            "withheld": sum(row["verdict"] == "withheld" for row in of),
            **Counter(why for row in of for why in row["why"]),
        }
        for (events, items, task), of in found.items()
    ]  # fmt: skip


def goals(rows: Sequence[Row]) -> list[Row]:
    """Compare the share of verdicts that are not wrong with the stated level; with bounds in place of quartiles."""
    found: list[Row] = []
    for way in WAYS[:2]:
        counted = count(_of_way(rows, way), truths(rows))
        if counted["wrong_share"] is not None:
            right = Spread(*(1.0 - counted[name] for name in ("wrong_share", "wrong_high", "wrong_low")))
            found.append(goal(f"verdicts that are not wrong: {way.heading.lower()}", right, CONFIDENCE))
    return found


def _of_way(rows: Sequence[Row], way: Way) -> list[Row]:
    return [row for of in groups(rows, way).values() for row in of]


SIZE_COLUMNS = {"events": ",d", "items": ",d", "content": "", "task": ""}
TRUTH_COLUMNS = {
    **SIZE_COLUMNS, "logs": "d", "mean": ".2%", "error": ".2%", "over_logs": ".2%", "over_seeds": ".2%", "true": "",
}  # fmt: skip
VERDICT_COLUMNS = {
    **SIZE_COLUMNS, "gains": "d", **dict.fromkeys(KINDS, "d"), "wrong": "d", "wrong_share": ".1%", "wrong_low": ".1%",
    "wrong_high": ".1%", "holds_mean": ".0%",
}  # fmt: skip
WHY_COLUMNS = {
    "events": ",d", "items": ",d", "task": "", "gains": "d", "withheld": "d", **dict.fromkeys(REASONS.values(), "d"),
}  # fmt: skip


def write(rows: list[Row], out: Path) -> None:
    """Print the tables and write them; the gains of every log go to a file of their own."""
    tables = [PageTable("The truth", TRUTH_WORDS, truth_rows(rows), TRUTH_COLUMNS)]
    for way in WAYS:
        tables.append(PageTable(way.heading, WAY_WORDS[way], verdict_rows(rows, way), VERDICT_COLUMNS))
    tables.append(PageTable("Why verdicts are withheld", WHY_WORDS, reason_rows(rows), WHY_COLUMNS))
    publish_tables(
        "verdicts", "How often a verdict is wrong", WORDS, tables, goals(rows),
        packages=("numpy", "scipy", "torchrec"), out=out,
    )  # fmt: skip
    write_results("verdicts-logs", rows, out=out)


KINDS_OF_ITEMS = NUM_CLUSTERS * NUM_SUBCLUSTERS
WORDS = f"""
How far a verdict of `compare` can be trusted, by the size of the log. Every log is synthetic and drawn anew:
users, items, tastes, clicks. Users of {NUM_USER_TYPES} types like {KINDS_OF_ITEMS} kinds of
items; an item's content tells its kind. Arm `side` has SIDs of that content: *explains*. Arm `side_exchanged`
has SIDs of the same content exchanged between items at random: *exchanged*, a control whose content explains
nothing. Gains are in {HEADLINE.title} over `none`, on the last {TEST_DAYS} of {TRAIN_DAYS + TEST_DAYS} days.

Each log is trained on twice, encoder and ranker from other seeds: `run.replicates: {REPLICATES}`. Stages run as
in any run, in one process, with thresholds of `compare` by default. Batches are by rule, the model is small and
trained for one epoch, the encoder for {ENCODER_EPOCHS} (`benchmarks/contest.py`). Columns without a value:
nothing was judged, or the truth is not known.

The same trainings are judged in four ways: *as reported*; by the *interval alone*, as if nothing spoke against
a training or its rows; and both with the first training alone, as if one training were allowed to show a
difference.
"""
TRUTH_WORDS = """
`mean` is the mean gain over logs, which stands for the true one at that size, `error` its standard error.
`true` says on which side of 0 its 95 % interval (Student's t over logs) lies, or `neither`; it is not known
from one log. `over_logs` and `over_seeds` are standard deviations of the gain: from log to log, of the mean
over two trainings, and from training to training on one log.
"""
REPORTED_WORDS = """
A shown difference (`better`, `worse`) is `wrong` unless the mean over logs lies clearly on its side: where that
is `neither`, every shown difference counts as wrong. `no difference shown` is never wrong. `wrong_share` is of
the verdicts that were not withheld and whose truth is known; `wrong_low` and `wrong_high` are its 95 % bounds
(Clopper and Pearson), as if verdicts were independent: both tasks and both arms of a log share `none`.
`holds_mean` is the share of intervals, of withheld gains too, that hold the mean over logs; an interval is of
the log that it was measured on, so that it need not be 95 %.
"""
WAY_WORDS = {
    REPORTED: REPORTED_WORDS,
    WAYS[1]: "What the interval over users and two trainings says by itself; it is here that 5 % are its own promise.",
    WAYS[2]: "What one training would have claimed. As reported, every difference of one training is withheld.",
    WAYS[3]: "What the interval over users says by itself, which knows nothing of other trainings.",
}
WHY_WORDS = "Of verdicts as reported; one may have several reasons."


if __name__ == "__main__":
    main()
