"""The comparison stage: every arm's held-out predictions and costs, side by side.

Inputs are the ranker's outputs (`--input arm.<name>.<replicate>=DIR`, replicates counted from 0: trainings of the same
arm with other seeds), and, of replicate 0, those of the encoders (`encoder.<name of its SIDs>`), `prepare` and
`materialize` (`dataset`). The output is `comparison.json`, the same as tables (text, Markdown, CSV) and figures (PNG),
and a self-contained page, `report.html`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sidestack.encoder.config import ENCODER_INPUT
from sidestack.encoder.sid.spec import DEFAULT_NAME
from sidestack.infra.config import digest, to_yaml
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import Manifest, read_manifest
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import StageRun, run_stage
from sidestack.pipelines.report.arms import (
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
from sidestack.pipelines.report.comparison import COMPARISON_FILE, ArmResult, Comparison, TaskResult, Training
from sidestack.pipelines.report.config import CompareConfig
from sidestack.pipelines.report.drawing import LIGHT, Plot, render
from sidestack.pipelines.report.encoder import read_encoder
from sidestack.pipelines.report.figures import plots
from sidestack.pipelines.report.gains import task_results
from sidestack.pipelines.report.learning import summarize_learning
from sidestack.pipelines.report.measure import TaskMeasured, measure
from sidestack.pipelines.report.outputs import Curve, RankerSummary, read_config_text, read_curves, read_section
from sidestack.pipelines.report.page import RunFile, render_page
from sidestack.pipelines.report.run_file import run_file
from sidestack.pipelines.report.segments import count_labels, first_root, training_rows
from sidestack.pipelines.report.table import as_csv, as_markdown, as_text
from sidestack.pipelines.report.training import differing_settings, training_of
from sidestack.pipelines.report.verdict import roi_doubt, with_verdicts
from sidestack.ranker.metric_registry import HEADLINE
from sidestack.ranker.statistics import return_on_investment

ENCODER = f"{ENCODER_INPUT}{DEFAULT_NAME}"
"""The encoder whose measures are reported; other encoders are inputs only for the run's file."""

INPUTS = (f"{PREFIX}*", ENCODER, f"{ENCODER_INPUT}*", "prepare", "dataset")

Curves = Mapping[str, Sequence[Mapping[str, Curve]]]
"""Arm -> the curves of each replicate, by name."""


def compare(run: StageRun[CompareConfig]) -> None:
    """Compare the arms and write the report, on rank 0 only.

    Raises:
        DataError: the reference arm or a replicate is missing, an output is not a ranker's, two replicates are the same
            training, the dataset has no tasks, or the arms did not predict all the rows they read, the same rows with
            the same labels.
    """
    if not run.world.is_main:
        return
    arms = arms_of(run.inputs, run.config.reference)
    curves = {name: [read_curves(path) for path in paths] for name, paths in arms.items()}
    comparison = compare_arms(run, arms, curves)
    run.facts["config_digest"] = comparison.config_digest
    _write(run, comparison, arms, curves)
    run.log.summary(comparison.model_dump(mode="json", include={"arms"}))
    print(as_text(comparison), flush=True)  # the stage's result: on stdout, apart from the log


def compare_arms(run: StageRun[CompareConfig], arms: Arms, curves: Curves) -> Comparison:
    """Return the report's numbers and verdicts; see `compare`."""
    config, reference = run.config, run.config.reference
    summaries = read_summaries(arms)
    manifests = {name: read_manifest(path) for name, path in run.inputs.items()}
    refuse_equal_trainings(arms, manifests)
    dataset = read_dataset(run.inputs["dataset"])
    tasks = dataset.spec.tasks
    if not tasks:
        raise DataError(f"{dataset.path}: dataset.json names no tasks; there is nothing to compare")
    dates, earlier_task = windows_of(summaries), first_root(tasks)
    earlier, trained_on = count_labels(training_rows(dataset, *dates.train), dataset.spec, earlier_task)
    measured = measure(arms, tuple(tasks), earlier, run.out)
    require_all_rows(summaries, measured.num_rows)
    sections = {name: [read_section(path, "ranker") for path in paths] for name, paths in arms.items()}
    trainings = {name: list(map(training_of, summaries[name], found)) for name, found in sections.items()}
    results = {task: _task_results(config, task, found, curves, trainings) for task, found in measured.tasks.items()}
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
        rules=config.verdict,
        trained_on=trained_on,
        differs=tuple(differing_settings({name: found[0] for name, found in sections.items()})),
        warnings=tuple(differences(summaries, manifests)),
        arms={
            name: _arm_result(config, typical(found), {task: results[task][name] for task in tasks}, trainings[name][0])
            for name, found in summaries.items()
        },
        encoder=read_encoder(run.inputs[ENCODER], run.inputs["dataset"]),
    )


def _task_results(
    config: CompareConfig,
    task: str,
    measured: TaskMeasured,
    curves: Curves,
    trainings: Mapping[str, Sequence[Training]],
) -> dict[str, TaskResult]:
    """Return every arm's results on a task, with verdicts."""
    learning = {
        name: summarize_learning(curves[name], of, task) for name, of in trainings.items() if of[0].steps is not None
    }
    results, replicates = task_results(config, measured), len(trainings[config.reference])
    return with_verdicts(results, learning, config.verdict, config.reference, replicates)


def _arm_result(
    config: CompareConfig, summary: RankerSummary, tasks: dict[str, TaskResult], training: Training
) -> ArmResult:
    found = (result.gain(HEADLINE.name, config.reference) for result in tasks.values())
    roi = return_on_investment([gain.gain for gain in found if gain], summary.feature_bytes_per_row / 1024)
    doubt = roi_doubt(tasks, summary.feature_bytes_per_row, config.verdict) if roi is not None else ""
    return ArmResult(
        tasks=tasks,
        training=training,
        roi=None if doubt else roi,
        roi_withheld=doubt,
        **summary.model_dump(exclude={"arm", "dates", "held_out_rows", "steps", "budget"}),
    )


def _config_digest(config: CompareConfig, manifests: Mapping[str, Manifest]) -> str:
    """Return a digest of every stage's configuration: of this one, and of its inputs by their manifests."""
    upstream = {name: manifest.facts.get("config", "") for name, manifest in manifests.items()}
    return digest({"compare": digest(config), **upstream})


def _write(run: StageRun[CompareConfig], comparison: Comparison, arms: Arms, curves: Curves) -> None:
    files = {
        COMPARISON_FILE: comparison.model_dump_json(indent=2) + "\n",
        "table.txt": as_text(comparison),
        "table.md": as_markdown(comparison),
        "table.csv": as_csv(comparison),
    }
    # Curves of each arm's first training only: further ones would cover it.
    figures = plots(comparison, {name: of_arm[0] for name, of_arm in curves.items()})
    configs = {name: read_config_text(path) for name, path in run.inputs.items()}
    configs["compare"] = to_yaml(run.config)
    files["report.html"] = render_page(comparison, figures, configs, _run_file(run, arms))
    for name, text in files.items():
        (run.out / name).write_text(text, encoding="utf-8")
    _write_pictures(run.out / "figures", figures)


def _write_pictures(folder: Path, figures: Iterable[Plot]) -> None:
    folder.mkdir()
    for figure in figures:
        (folder / f"{figure.name}.png").write_bytes(render(figure, LIGHT, "png"))


def _run_file(run: StageRun[CompareConfig], arms: Arms) -> RunFile:
    try:
        return RunFile(run_file(run.inputs, arms, run.config))
    except DataError as error:
        return RunFile("", str(error))


if __name__ == "__main__":
    run_stage("compare", "compare", CompareConfig, INPUTS, compare)
