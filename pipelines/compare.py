"""The comparison stage: every arm's held-out predictions and costs, side by side.

Inputs are the ranker's outputs (`--input arm.<name>.<replicate>=DIR`, replicates counted from 0: trainings of the same
arm from other seeds), the encoder's and the materialized dataset's, both of replicate 0. The output is
`comparison.json`, the same as tables (text, Markdown, CSV) and figures (PNG), and a page that needs nothing beside
itself, `report.html`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from infra.commit import Manifest, read_manifest
from infra.config import digest, to_yaml
from infra.errors import DataError
from infra.snapshot import read_dataset
from infra.stage import StageRun, run_stage
from pipelines.report.arms import (
    PREFIX,
    Arms,
    arms_of,
    differences,
    input_name,
    read_summaries,
    refuse_equal_trainings,
    require_all_rows,
    typical,
    windows_of,
)
from pipelines.report.comparison import COMPARISON_FILE, ArmResult, Comparison, TaskResult
from pipelines.report.config import CompareConfig
from pipelines.report.drawing import LIGHT, Plot, render
from pipelines.report.encoder import read_encoder
from pipelines.report.figures import plots
from pipelines.report.gains import task_results
from pipelines.report.measure import measure
from pipelines.report.outputs import Curve, RankerSummary, learning_curve, read_config_text, read_curves
from pipelines.report.page import render_page
from pipelines.report.segments import count_positives, first_root, training_rows
from pipelines.report.table import as_csv, as_markdown, as_text
from ranker.metric_registry import HEADLINE
from ranker.statistics import return_on_investment


def compare(run: StageRun[CompareConfig]) -> None:
    """Compare the arms and write the report; rank 0 works.

    Raises:
        DataError: the reference arm or a replicate is missing, an output is not a ranker's, two replicates are the same
            training, the dataset has no tasks, or the arms did not predict the same rows with the same labels, each as
            many as it read.
    """
    if not run.world.is_main:
        return
    arms = arms_of(run.inputs, run.config.reference)
    comparison = _comparison(run, arms)
    run.facts["config_digest"] = comparison.config_digest
    _write(run, comparison, arms)
    run.log.summary(comparison.model_dump(mode="json", include={"arms"}))
    print(as_text(comparison), flush=True)  # the stage's result: on stdout, apart from the log


def _comparison(run: StageRun[CompareConfig], arms: Arms) -> Comparison:
    config, reference = run.config, run.config.reference
    summaries = read_summaries(arms)
    manifests = {name: read_manifest(path) for name, path in run.inputs.items()}
    refuse_equal_trainings(arms, manifests)
    dataset = read_dataset(run.inputs["dataset"])
    tasks = dataset.spec.tasks
    if not tasks:
        raise DataError(f"{dataset.path}: dataset.json names no tasks; there is nothing to compare")
    dates, earlier_task = windows_of(summaries), first_root(tasks)
    earlier = count_positives(training_rows(dataset, earlier_task, *dates.train), dataset.spec, earlier_task)
    measured = measure(arms, tuple(tasks), earlier, run.out)
    require_all_rows(summaries, measured.num_rows)
    results = {task: task_results(config, found) for task, found in measured.tasks.items()}
    by_arm = {name: {task: results[task][name] for task in tasks} for name in arms}
    return Comparison(
        reference=reference,
        tasks=tasks,
        earlier_task=earlier_task,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
        rows=measured.num_rows,
        users=measured.num_users,
        replicates=len(arms[reference]),
        origin=dataset.spec.origin,
        train=(dates.train[0].isoformat(), dates.train[1].isoformat()),
        held_out=(dates.held_out[0].isoformat(), dates.held_out[1].isoformat()),
        config_digest=_config_digest(config, manifests),
        versions=manifests[input_name(reference, 0)].versions,
        inputs={name: manifest.digest for name, manifest in manifests.items()},
        warnings=tuple(differences(summaries, manifests)),
        arms={name: _arm_result(typical(summaries[name]), by_task, reference) for name, by_task in by_arm.items()},
        encoder=read_encoder(run.inputs["encoder"]),
    )


def _arm_result(summary: RankerSummary, tasks: dict[str, TaskResult], reference: str) -> ArmResult:
    gains = [gain.gain for result in tasks.values() if (gain := result.gain(HEADLINE.name, reference)) is not None]
    return ArmResult(
        tasks=tasks,
        roi=return_on_investment(gains, summary.feature_bytes_per_row / 1024),
        **summary.model_dump(exclude={"arm", "dates", "held_out_rows"}),
    )


def _config_digest(config: CompareConfig, manifests: Mapping[str, Manifest]) -> str:
    """Digest what every stage was configured with: this one, and its inputs by their manifests."""
    upstream = {name: manifest.facts.get("config", "") for name, manifest in manifests.items()}
    return digest({"compare": digest(config), **upstream})


def _write(run: StageRun[CompareConfig], comparison: Comparison, arms: Arms) -> None:
    files = {
        COMPARISON_FILE: comparison.model_dump_json(indent=2) + "\n",
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


def _learning_curves(comparison: Comparison, arms: Arms) -> dict[str, dict[str, Curve]]:
    """Read the curves of each arm's first training: further ones would lie upon it."""
    curves = {name: read_curves(paths[0]) for name, paths in arms.items()}
    return {task: {name: learning_curve(curves[name], task) for name in arms} for task in comparison.tasks}


if __name__ == "__main__":
    run_stage("compare", "compare", CompareConfig, (f"{PREFIX}*", "encoder", "dataset"), compare)
