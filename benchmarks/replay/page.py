"""The replay's tables and text, for the terminal and for docs/results/replay.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sidestack.benchmarks.record import Row, markdown_table, source
from sidestack.benchmarks.replay.measures import ALL, CONTROL, Growth, best, of_policy
from sidestack.benchmarks.replay.run import EVERY
from sidestack.pipelines.config import PipelineConfig

TITLE = "A year replayed: retraining week by week"
PACKAGES = ("torchrec", "pyarrow")
POLICY_COLUMNS = {
    "policy": "", "click NE": ".4f", "click NE gain": ">", "conversion NE": ".4f", "conversion NE gain": ">",
    "promoted": ">", "SIDs changed a cycle": ".1%", "CPU s a cycle": ".1f", "MB of the run": ",.0f",
}  # fmt: skip
GROWTH_COLUMNS = {
    "stage": "", "CPU s": ".2f", "fixed": ".2f", "ms a row learned": ".3f", "ms a row of the log": ".4f",
    "does not grow": ".0%",
}  # fmt: skip
WORDS = """
One champion is trained on the first {learned} periods of {days} days. From there each policy of
`retrain.encoder.policy` has a run of its own: a cycle a period, {cycles} of them, by the stages and gates of
`pipelines.retrain`. What a ranker serves is measured on the newest period before any candidate learns it, so every
NE is of the future. The log ({origin}): {users:.0%} of the users, {rows:,} impressions until {last}, {first_items:,}
items when the first champion is trained and {last_items:,} at the end. Arm `{arm}`, a small model. `refresh` trains the
encoder on in every cycle; `rebuild` trains a new one in one cycle in {every}, whose ranker learns {rebuilt}, and
appends in the others. All settings: [{settings}](../../benchmarks/replay/{settings}).
"""
READING = """
NE and gains are means over the last half of the cycles, clicks of the newest period, conversions of the newest period
whose labels are known. A gain is the share of `{control}`'s NE by which the policy's is lower, ± the standard error
over cycles, as if these were independent. A cycle promotes its candidate where all gates are open; otherwise the
champion stays, and the next candidate learns both periods. CPU seconds are of one cycle's stages, each a process that
was forked with its imports done. Pictures show each figure at its cycle's last date.
"""
COST = """
CPU seconds of `{policy}`'s cycles, fitted by least squares without negative terms as a fixed part, a part of the rows
that the cycle learns (clicks of new dates and conversions that became known; of several periods after a rejection) and
a part of all rows of the log. Periods are of about one size, so what a new one costs beyond training is in the fixed
part. "does not grow": the share of the last cycle's seconds that is not of the log's length.
"""


def policy_rows(lines: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the policies' lines, formatted for display."""
    return [
        {
            "policy": line["policy"],
            "click NE": line["click_ne"],
            "click NE gain": _gain(line, "click"),
            "conversion NE": line["conversion_ne"],
            "conversion NE gain": _gain(line, "conversion"),
            "promoted": f"{line['promoted']} of {line['cycles']}" if line["policy"] != CONTROL else "",
            "SIDs changed a cycle": line["sids_changed"],
            "CPU s a cycle": line["cpu_seconds"],
            "MB of the run": line["bytes"] / 1e6,
        }
        for line in lines
    ]


def growth_rows(fits: Sequence[Growth]) -> list[Row]:
    """Return the fits, formatted for display."""
    return [
        {
            "stage": fit.stage,
            "CPU s": fit.seconds,
            "fixed": fit.fixed,
            "ms a row learned": 1e3 * fit.a_row_learned,
            "ms a row of the log": 1e3 * fit.a_row_log,
            "does not grow": fit.share,
        }
        for fit in fits
    ]


def verdict(lines: Sequence[Mapping[str, Any]], fits: Sequence[Growth], costed: str) -> str:
    """Return a paragraph on which policy wins, by how much, and the cost of a cycle.

    Args:
        lines: one line per policy. fits: of the cost of `costed`'s cycles.
    """
    return " ".join(_sentences(lines, fits, costed))


def _sentences(lines: Sequence[Mapping[str, Any]], fits: Sequence[Growth], costed: str) -> Iterator[str]:
    for task in ("click", "conversion"):
        if any(line[f"{task}_ne"] is not None for line in lines):
            yield _winner(lines, task)
    cheapest = min((line for line in lines if line["policy"] != CONTROL), key=lambda line: float(line["cpu_seconds"]))
    others = [line for line in lines if line["policy"] not in (CONTROL, cheapest["policy"])]
    least = cheapest["cpu_seconds"]
    ratios = [f"`{line['policy']}` {line['cpu_seconds'] / least:.1f} times as many" for line in others]
    beside = f"; {' and '.join(ratios)}" if ratios else ""
    yield f"A cycle of `{cheapest['policy']}` takes {least:.0f} CPU seconds, the fewest{beside}."
    whole = next(fit for fit in fits if fit.stage == ALL)
    yield f"Of the CPU seconds of the last cycle of `{costed}`, {whole.share:.0%} do not grow with the log."


def _winner(lines: Sequence[Mapping[str, Any]], task: str) -> str:
    first = best(lines, task)
    if first["policy"] == CONTROL:
        return f"By {task} NE no policy is better than to train no more (`{CONTROL}`)."
    gain, error = first[f"{task}_gain"], first[f"{task}_error"]
    clear = error is not None and gain > 2 * error
    sentence = f"By {task} NE `{first['policy']}` is best, {_gain(first, task)} over `{CONTROL}`"
    sentence += "" if clear else ", less than two standard errors"
    near = [
        line
        for line in lines
        if line["policy"] not in (CONTROL, first["policy"])
        and error is not None
        and line[f"{task}_gain"] is not None
        and gain - line[f"{task}_gain"] <= 2 * error
    ]
    worse = [
        f"`{line['policy']}` is worse than `{CONTROL}` ({_gain(line, task)})"
        for line in lines
        if line["policy"] != CONTROL and line[f"{task}_gain"] is not None and line[f"{task}_gain"] < 0
    ]
    cheapest = min([first, *near], key=lambda line: float(line["cpu_seconds"]))
    named = " and ".join(f"`{line['policy']}`" for line in near)
    within = [f"{named} within two standard errors of it; `{cheapest['policy']}` costs least of these"] if near else []
    return "; ".join([sentence, *within, *worse]) + "."


def _gain(line: Mapping[str, Any], task: str) -> str:
    gain, error = line[f"{task}_gain"], line[f"{task}_error"]
    if gain is None:
        return ""
    return f"{100 * gain:+.2f} %" + ("" if error is None else f" ±{100 * error:.2f}")


def as_markdown(
    config: PipelineConfig,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    lines: Sequence[Mapping[str, Any]],
    fits: Sequence[Growth],
    costed: str,
    pictures: Mapping[str, str],
) -> str:
    """Return the page.

    Args:
        config: of the runs. facts: `origin`, `users`, `learned`, and `settings`, the settings' file.
        rows: one row per cycle. lines: one line per policy.
        fits: of the cost of `costed`'s cycles. pictures: file name -> description.
    """
    own = of_policy(rows, costed)
    first = next(row for row in rows if row["cycle"] == 1)
    days = config.retrain.encoder.rebuild_days
    words = WORDS.format(
        **facts,
        days=config.retrain.every_days,
        cycles=len(own),
        rows=own[-1]["rows_log"],
        last=own[-1]["newest"],
        first_items=first["items"],
        last_items=own[-1]["items"],
        arm=config.ranker.arm,
        every=EVERY["rebuild"],
        rebuilt="all dates" if days is None else f"the newest {days} days",
    )
    parts = [
        f"# {TITLE}",
        verdict(lines, fits, costed),
        words.strip(),
        source(PACKAGES),
        READING.format(control=CONTROL).strip(),
        markdown_table(policy_rows(lines), POLICY_COLUMNS),
        "## What a cycle costs as the log grows",
        COST.format(policy=costed).strip(),
        markdown_table(growth_rows(fits), GROWTH_COLUMNS),
        *(f"![{text}]({name})" for name, text in pictures.items()),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
