"""The comparison stage: every arm's held-out predictions and costs, side by side.

Inputs are one ranker output an arm (`--input arm.<name>=DIR`), the encoder's and the materialized
dataset's. The output is `comparison.json`, the same as tables (text, Markdown, CSV) and figures
(PNG), and a page that needs nothing beside itself, `report.html`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.commit import Manifest, read_manifest
from infra.config import digest, to_yaml
from infra.errors import DataError
from infra.stage import StageRun, run_stage
from infra.tables import TASKS, read_dataset
from pipelines.report.comparison import ArmResult, Comparison, Gain, TaskResult
from pipelines.report.config import CompareConfig
from pipelines.report.encoder import read_encoder
from pipelines.report.figures import LIGHT, Plot, plots, render
from pipelines.report.outputs import (
    Curve,
    RankerSummary,
    learning_curve,
    read_config_text,
    read_curves,
    read_ranker_summary,
)
from pipelines.report.page import render_page
from pipelines.report.predictions import NO_LABEL, read_predictions, require_same_rows
from pipelines.report.table import as_csv, as_markdown, as_text, tasks_of
from ranker.statistics import (
    TaskMetrics,
    gain,
    gain_interval,
    log_loss,
    resample_users,
    return_on_investment,
    sum_by_user,
    task_metrics,
)

PREFIX = "arm."


@dataclass
class _Measured:
    """What the predictions of all arms come down to.

    Attributes:
        rows: held-out rows. users: users among them.
        metrics: task -> arm -> how well it predicts.
        losses: task -> arm -> summed log loss of each user [U], the same users in the same order.
    """

    rows: int = 0
    users: int = 0
    metrics: dict[str, dict[str, TaskMetrics]] = field(default_factory=dict)
    losses: dict[str, dict[str, NDArray[np.float64]]] = field(default_factory=dict)


def compare(run: StageRun[CompareConfig]) -> None:
    """Compare the arms and write the report; rank 0 works.

    Raises:
        DataError: the reference arm is missing, an output is not a ranker's, or the arms did not
            predict the same rows with the same labels.
    """
    if not run.world.is_main:
        return
    arms = _reference_first(run)
    summaries = {name: _summary_of(name, path) for name, path in arms.items()}
    comparison = _comparison(run, arms, summaries)
    run.facts["config_digest"] = comparison.config_digest
    _write(run, comparison, arms)
    run.log.summary(comparison.model_dump(mode="json", include={"arms"}))
    print(as_text(comparison), flush=True)  # the stage's result: on stdout, apart from the log


def _reference_first(run: StageRun[CompareConfig]) -> dict[str, Path]:
    given = {name.removeprefix(PREFIX): path for name, path in run.inputs.items() if name.startswith(PREFIX)}
    reference = run.config.reference
    if reference not in given:
        arms = ", ".join(given) or "none at all"
        raise DataError(f"compare.reference={reference!r}: must be one of the arms given ({arms})")
    return {reference: given[reference], **given}


def _summary_of(name: str, path: Path) -> RankerSummary:
    summary = read_ranker_summary(path)
    if summary.arm != name:
        raise DataError(f"{path}: holds the arm {summary.arm!r}, was given as {PREFIX}{name}")
    return summary


def _comparison(
    run: StageRun[CompareConfig], arms: Mapping[str, Path], summaries: Mapping[str, RankerSummary]
) -> Comparison:
    config, reference = run.config, run.config.reference
    spec = read_dataset(run.inputs["dataset"]).spec
    manifests = {name: read_manifest(path) for name, path in run.inputs.items()}
    measured = _measure(arms)
    results = {task: _task_results(config, measured, task) for task in measured.metrics}
    return Comparison(
        reference=reference,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
        rows=measured.rows,
        users=measured.users,
        origin=spec.origin,
        train=(spec.train[0].isoformat(), spec.train[1].isoformat()),
        test=(spec.test[0].isoformat(), spec.test[1].isoformat()),
        config_digest=_config_digest(config, manifests),
        versions=manifests[PREFIX + reference].versions,
        inputs={name: manifest.digest for name, manifest in manifests.items()},
        warnings=tuple(_differences(summaries, manifests)),
        arms={
            name: _arm_result(summary, {task: results[task][name] for task in results})
            for name, summary in summaries.items()
        },
        encoder=read_encoder(run.inputs["encoder"]),
    )


def _measure(arms: Mapping[str, Path]) -> _Measured:
    """Reduce each arm's predictions; no more than two arms' are in memory at a time."""
    measured = _Measured(metrics={task: {} for task in TASKS}, losses={task: {} for task in TASKS})
    reference = None
    for name, path in arms.items():
        predictions = read_predictions(path)
        if reference is None:
            reference = predictions
            measured.rows = len(reference)
            measured.users = len(np.unique(reference.identity["user_id"]))
        require_same_rows(predictions, reference)
        for task in TASKS:
            labelled_N = predictions.labels[task] != NO_LABEL
            labels_N = predictions.labels[task][labelled_N]
            scores_N = predictions.probabilities[task][labelled_N]
            users_N = predictions.identity["user_id"][labelled_N]
            measured.metrics[task][name] = task_metrics(labels_N, scores_N)
            measured.losses[task][name] = sum_by_user(users_N, log_loss(labels_N, scores_N))[1]
    return measured


def _task_results(config: CompareConfig, measured: _Measured, task: str) -> dict[str, TaskResult]:
    metrics, names = measured.metrics[task], list(measured.metrics[task])
    losses_UA = np.stack([measured.losses[task][name] for name in names], axis=1)
    sums_BA = resample_users(losses_UA, config.resamples, config.seed)
    sums = dict(zip(names, sums_BA.T, strict=True))
    results = {}
    for name in names:
        over = {
            other: found
            for other in names
            if other != name and (found := _gain(metrics, sums, name, other, config.confidence)) is not None
        }
        against = over.get(config.reference)
        itself = name == config.reference and metrics[name].ne is not None
        results[name] = TaskResult(
            num=metrics[name].num,
            positives=metrics[name].positives,
            ne=metrics[name].ne,
            ne_gain=against.ne_gain if against else 0.0 if itself else None,
            ne_gain_interval=against.ne_gain_interval if against else None,
            auc=metrics[name].auc,
            calibration=metrics[name].calibration,
            over=over,
        )
    return results


def _gain(
    metrics: Mapping[str, TaskMetrics],
    sums: Mapping[str, NDArray[np.float64]],
    name: str,
    other: str,
    confidence: float,
) -> Gain | None:
    mine, theirs = metrics[name].ne, metrics[other].ne
    if mine is None or theirs is None:
        return None
    found = gain(mine, theirs)
    interval = gain_interval(sums[name], sums[other], confidence)
    if found is None or interval is None:
        return None
    return Gain(ne_gain=found, ne_gain_interval=interval)


def _arm_result(summary: RankerSummary, tasks: dict[str, TaskResult]) -> ArmResult:
    gains = [result.ne_gain for result in tasks.values() if result.ne_gain is not None]
    return ArmResult(
        tasks=tasks,
        roi=return_on_investment(gains, summary.feature_bytes_per_row / 1024),
        **summary.model_dump(exclude={"arm"}),
    )


def _config_digest(config: CompareConfig, manifests: Mapping[str, Manifest]) -> str:
    """Digest what every stage was configured with: this one, and its inputs by their manifests."""
    upstream = {name: manifest.facts.get("config", "") for name, manifest in manifests.items()}
    return digest({"compare": digest(config), **upstream})


def _differences(summaries: Mapping[str, RankerSummary], manifests: Mapping[str, Manifest]) -> Iterable[str]:
    """Name what differs between the arms beside the arm itself."""
    sizes = {name: summary.world_size for name, summary in summaries.items()}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield f"arms ran on different numbers of ranks ({told}): speed and memory do not compare"
    dataset = manifests["dataset"].digest
    for name in summaries:
        if manifests[PREFIX + name].inputs.get("dataset", dataset) != dataset:
            yield f"arm {name} was trained on another dataset than the one given"
    if len({str(manifests[PREFIX + name].versions) for name in summaries}) > 1:
        yield "arms ran with different versions of the libraries"


def _write(run: StageRun[CompareConfig], comparison: Comparison, arms: Mapping[str, Path]) -> None:
    files = {
        "comparison.json": comparison.model_dump_json(indent=2) + "\n",
        "table.txt": as_text(comparison),
        "table.md": as_markdown(comparison),
        "table.csv": as_csv(comparison),
    }
    figures = plots(comparison, _learning_curves(comparison, arms))
    configs = {name: read_config_text(path) for name, path in run.inputs.items()}
    configs["compare"] = to_yaml(run.config)
    files["report.html"] = render_page(comparison, figures, configs)
    for name, text in files.items():
        (run.out / name).write_text(text, encoding="utf-8")
    _write_pictures(run.out / "figures", figures)


def _write_pictures(folder: Path, figures: Iterable[Plot]) -> None:
    folder.mkdir()
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(render(figure, LIGHT, "png"))


def _learning_curves(comparison: Comparison, arms: Mapping[str, Path]) -> dict[str, dict[str, Curve]]:
    curves = {name: read_curves(path) for name, path in arms.items()}
    return {task: {name: learning_curve(curves[name], task) for name in arms} for task in tasks_of(comparison)}


if __name__ == "__main__":
    run_stage("compare", "compare", CompareConfig, (f"{PREFIX}*", "encoder", "dataset"), compare)
