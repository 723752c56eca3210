"""Tune every arm by the validation dates: `python -m pipelines.studies.tune --config FILE [--set ...] [--run]`.

Every arm of the run is trained with every setting of section `tune`, in rungs of increasing steps (`ranker.budget`),
and measured on the last training dates. The command prints the best setting of each arm and the search's cost. It
writes `tuned.yaml`, the run's file with each arm's best setting, for `pipelines.run`; `--run` runs it at once.
"""

from collections.abc import Sequence
from pathlib import Path

from sidestack.infra.config import plain, to_yaml
from sidestack.infra.remote.copies import put
from sidestack.pipelines.config import read_config
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.run import command_line, exit_status, print_result, relative_to_cwd, run_pipeline, run_stages
from sidestack.pipelines.studies.tune.choose import RESULT_FILE, TABLE_FILE, Tuned
from sidestack.pipelines.studies.tune.plan import Left, rungs, tune_stages, tuned_values

TUNED_FILE = "tuned.yaml"


def tune(config_file: Path, overrides: Sequence[str]) -> tuple[Path, Path]:
    """Train every arm's settings rung by rung, choose, and write the run's file with the chosen settings.

    Returns:
        the committed directory of the choice, and the written file.

    Raises:
        SidestackError, StopSignal: see `pipelines.run.run_pipeline`.
    """
    values, config = read_config(config_file, overrides)
    later: list[Left] = []
    while True:
        found = run_stages(tune_stages(config, later), config.run, values, plain(config), f"tune, rung {len(later)}")
        result = Tuned.model_validate_json((found / RESULT_FILE).read_text(encoding="utf-8"))
        later.append(result.better_half)
        if len(later) == len(rungs(config)) or all(len(settings) == 1 for settings in later[-1].values()):
            break
    tuned = run_dir(config.run) / TUNED_FILE
    text = to_yaml(tuned_values(values, config, {arm: trial.setting for arm, trial in result.best.items()}))
    tuned.write_text(text, encoding="utf-8")
    put(tuned)
    return found, tuned


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error, 128 + the signal's number after a signal.
    """
    parser = command_line("pipelines.studies.tune", "Tune every arm by the validation dates.")
    parser.add_argument("--run", action="store_true", help="then run the contest with what was chosen")
    arguments = parser.parse_args(argv)
    with exit_status():
        found, tuned = tune(arguments.config, arguments.set)
        print((found / TABLE_FILE).read_text(encoding="utf-8"))
        print(f"trials  {relative_to_cwd(found / RESULT_FILE)}")
        print(f"run it  make run CONFIG={relative_to_cwd(tuned)}", flush=True)
        if arguments.run:
            print_result(run_pipeline(tuned))


if __name__ == "__main__":
    main()
