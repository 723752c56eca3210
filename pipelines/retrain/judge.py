"""Stage `judge`: measure candidate and champion on dates that neither has learned, and evaluate gates.

    python -m pipelines.retrain.judge --config FILE --input candidate=DIR [--input champion=DIR] ... --out DIR

`candidate` and `reference` are outputs of rankers, `champion` one of `ranker.score`, `drift` one of `pipelines.drift`,
`export` one of `ranker.export`: its commit shows that the exported model loads and answers. Only rank 0 works.
"""

import json
from typing import Any

from sidestack.infra.distributed import raise_on_all_ranks
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.stage import StageRun, run_stage
from sidestack.infra.tables import read_json
from sidestack.pipelines.drift.result import DRIFT_FILE, figures
from sidestack.pipelines.retrain.config import JUDGE, JudgeConfig
from sidestack.pipelines.retrain.gates import drift_gates, may_promote, task_gates
from sidestack.pipelines.retrain.ledger import Gate
from sidestack.pipelines.retrain.measure import CANDIDATE, CHAMPION, MODELS, Measured, measure
from sidestack.pipelines.retrain.text_tables import gate_table

JUDGEMENT_FILE = "judgement.json"


def judge(run: StageRun[JudgeConfig]) -> None:
    """Measure, judge, and write `judgement.json`; the body of the stage.

    Raises:
        DataError: predictions break their contract, or models did not predict the same rows.
    """
    with raise_on_all_ranks(run.world.committing, "judging the candidate"):
        if run.world.is_main:
            _judge(run)


def _judge(run: StageRun[JudgeConfig]) -> None:
    config = run.config
    outputs = {model: run.inputs[model] for model in MODELS if model in run.inputs}
    measured = measure(outputs, config.measured, config.gates, run.out)
    drifted = figures(read_json(run.inputs["drift"] / DRIFT_FILE)) if "drift" in run.inputs else {}
    tasks = read_dataset(run.inputs["dataset"]).spec.tasks
    roots = [name for name, task in tasks.items() if task.given is None]
    gates: list[Gate] = []
    if CANDIDATE in outputs:
        has_champion = CHAMPION in outputs
        gates += task_gates(config.gates, measured.tasks, roots, has_champion)
        gates += drift_gates(config.gates, drifted) if has_champion else []
        answered = "the exported model was loaded again and answered as the ranker predicted"
        gates.append(Gate(name="export", verdict="open", rule="loads and answers", why=answered))
    values = {**_metrics(measured), **drifted}
    content: dict[str, Any] = {
        "promote": CANDIDATE in outputs and may_promote(gates),
        "gates": [gate.model_dump(mode="json") for gate in gates],
        "figures": values,
        "by_day": measured.by_day,
    }
    (run.out / JUDGEMENT_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    run.log.metrics(0, values)
    run.log.summary({"promote": content["promote"], "gates": {gate.name: gate.verdict for gate in gates}})
    if gates:
        run.log.info(gate_table(gates))


def _metrics(measured: Measured) -> dict[str, float]:
    """Return the defined metrics and gains of the models, by name."""
    found = {
        f"{model}_{task}_{metric}": value
        for model, by_task in measured.models.items()
        for task, metrics in by_task.items()
        for metric, value in metrics.items()
        if value is not None
    }
    for task, one in measured.tasks.items():
        if one.gain is not None:
            named = zip(("gain", "gain_low", "gain_high"), one.gain, strict=True)
            found |= {f"{task}_{name}": value for name, value in named}
    return found


def main() -> None:
    """Run the stage from the command line."""
    optional = [*MODELS, "drift", "export"]
    run_stage(JUDGE, JUDGE, JudgeConfig, ["dataset"], judge, optional=optional)


if __name__ == "__main__":
    main()
