"""The compared arms: their outputs, and checks that these are comparable."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from sidestack.infra.errors import DataError
from sidestack.infra.manifest import Manifest
from sidestack.pipelines.report.outputs import RankerSummary, Windows, read_ranker_summary

PREFIX = "arm."

Arms = Mapping[str, Sequence[Path]]
"""Arm -> committed ranker output of each replicate; the reference comes first."""


def input_name(arm: str, replicate: int) -> str:
    """Return the name of the input for one replicate of an arm."""
    return f"{PREFIX}{arm}.{replicate}"


def arms_of(inputs: Mapping[str, Path], reference: str) -> Arms:
    """Collect the inputs `arm.<name>.<replicate>`, replicates counted from 0.

    Raises:
        DataError: a name without a replicate, an arm that lacks a replicate of another arm, or no reference.
    """
    given: dict[str, dict[int, Path]] = {}
    for name, path in inputs.items():
        if name.startswith(PREFIX):
            arm, replicate = _parsed(name)
            given.setdefault(arm, {})[replicate] = path
    if reference not in given:
        raise DataError(f"compare.reference={reference!r}: must be one of the arms given ({_listed(given)})")
    most = max(max(found) for found in given.values())
    for arm, found in given.items():
        for replicate in range(most + 1):
            if replicate not in found:
                rule = f"every arm must have replicates 0 to {most}, as others have"
                raise DataError(f"arm {arm!r}: replicate {replicate} is missing; {rule}")
    ordered = {reference: given[reference], **given}
    return {arm: [path for _, path in sorted(found.items())] for arm, found in ordered.items()}


def _parsed(name: str) -> tuple[str, int]:
    arm, _, number = name.removeprefix(PREFIX).rpartition(".")
    if not arm or not number.isdecimal() or str(int(number)) != number:
        raise DataError(f"input {name!r}: must be named {PREFIX}<name>.<replicate>, the replicate a number from 0")
    return arm, int(number)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none at all"


def read_summaries(arms: Arms) -> dict[str, list[RankerSummary]]:
    """Read the final summary of every replicate of every arm.

    Raises:
        DataError: an output is not a ranker's, or is from another arm than its input's name.
    """
    summaries: dict[str, list[RankerSummary]] = {}
    for arm, paths in arms.items():
        for replicate, path in enumerate(paths):
            summary = read_ranker_summary(path)
            if summary.arm != arm:
                raise DataError(f"{path}: holds the arm {summary.arm!r}, was given as {input_name(arm, replicate)}")
            summaries.setdefault(arm, []).append(summary)
    return summaries


def windows_of(summaries: Mapping[str, Sequence[RankerSummary]]) -> Windows:
    """Return the dates on which all arms were trained and measured.

    Raises:
        DataError: two trainings have different dates.
    """
    found = {summary.dates: arm for arm, of_arm in summaries.items() for summary in of_arm}
    if len(found) > 1:
        windows = "; ".join(f"{arm}: {dates.train[0]} to {dates.train[1]}" for dates, arm in found.items())
        raise DataError(f"the arms were trained or measured on different dates ({windows}): they do not compare")
    return next(iter(found))


def require_all_rows(summaries: Mapping[str, Sequence[RankerSummary]], predicted: int) -> None:
    """Check that every training predicted as many rows as it read, if its summary has that number.

    Args:
        summaries: of every replicate of every arm. predicted: number of rows that each predicted.

    Raises:
        DataError: names the training and both numbers.
    """
    for arm, of_arm in summaries.items():
        for replicate, summary in enumerate(of_arm):
            if summary.held_out_rows not in (None, predicted):
                fault = f"{predicted:,} rows are predicted, its summary says that {summary.held_out_rows:,} were read"
                raise DataError(f"{input_name(arm, replicate)}: {fault}")


def typical(summaries: Sequence[RankerSummary]) -> RankerSummary:
    """Return one arm's costs: the median over replicates of measured values, all else from the first replicate."""
    seconds = [summary.train_seconds for summary in summaries if summary.train_seconds is not None]
    measured = {
        "samples_per_second": median(summary.samples_per_second for summary in summaries),
        "peak_memory_bytes": round(median(summary.peak_memory_bytes for summary in summaries)),
        "feature_bytes_per_row": median(summary.feature_bytes_per_row for summary in summaries),
        "train_seconds": median(seconds) if seconds else None,
    }
    return summaries[0].model_copy(update=measured)


def refuse_equal_trainings(arms: Arms, manifests: Mapping[str, Manifest]) -> None:
    """Check that the replicates of an arm are different trainings; otherwise their spread would be too small.

    Raises:
        DataError: two have the same configuration and data.
    """
    for arm, paths in arms.items():
        seen: dict[tuple[object, str | None], int] = {}
        for replicate in range(len(paths)):
            manifest = manifests[input_name(arm, replicate)]
            work = (manifest.facts.get("config"), manifest.inputs.get("dataset"))
            if work in seen:
                both = f"replicates {seen[work]} and {replicate}"
                raise DataError(f"arm {arm!r}: {both} have the same configuration and data: one training, not two")
            seen[work] = replicate


def differences(summaries: Mapping[str, Sequence[RankerSummary]], manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """Return what differs between arms besides the arm itself, and between replicates besides the seeds."""
    trained = [(arm, replicate) for arm, found in summaries.items() for replicate in range(len(found))]
    sizes = {
        arm: [summary.world_size for summary in found]
        for arm, found in summaries.items()
        if any(summary.world_size is not None for summary in found)  # the baseline has no ranks
    }
    if len({size for found in sizes.values() for size in found}) > 1:
        counts = ", ".join(f"{arm} {'/'.join(map(str, dict.fromkeys(found)))}" for arm, found in sizes.items())
        yield f"arms ran on different numbers of ranks ({counts}): speed and memory do not compare"
    reference = next(iter(summaries))
    for arm, replicate in trained:
        expected = manifests["dataset" if replicate == 0 else input_name(reference, replicate)]
        dataset = expected.digest if replicate == 0 else expected.inputs.get("dataset")
        if manifests[input_name(arm, replicate)].inputs.get("dataset", dataset) != dataset:
            other = "the one given" if replicate == 0 else f"{reference} in replicate {replicate}"
            yield f"arm {arm} was trained on another dataset than {other}"
    if len({str(manifests[input_name(*one)].versions) for one in trained}) > 1:
        yield "arms ran with different versions of the libraries"
