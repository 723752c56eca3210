"""`python -m pipelines.tune --config FILE [--set section.key=value]`: tune every arm by the validation dates.

Every arm of the run is trained with every setting of section `tune` and measured on the last training dates. Printed
is the best of each arm; `tuned.yaml` has them as overlays.
"""

from collections.abc import Sequence
from pathlib import Path

from infra.config import plain
from pipelines.config import read_config
from pipelines.run import command_line, exit_status, near, run_stages
from pipelines.tune.choose import RESULT_FILE, TABLE_FILE, TUNED_FILE
from pipelines.tune.plan import tune_stages


def tune(config_file: Path, overrides: Sequence[str]) -> Path:
    """Train every arm with every setting, and choose.

    Returns:
        the committed directory of the choice.

    Raises:
        SidestackError, Stopped: see `pipelines.run.run_pipeline`.
    """
    values, config = read_config(config_file, overrides)
    return run_stages(tune_stages(config), config.run, values, plain(config), "tune")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after a fault, 128 + the signal's number after a signal.
    """
    arguments = command_line("pipelines.tune", "Tune every arm by the validation dates.").parse_args(argv)
    with exit_status():
        found = tune(arguments.config, arguments.set)
        print((found / TABLE_FILE).read_text())
        for what, file in (("overlays", TUNED_FILE), ("all", RESULT_FILE)):
            print(f"{what:<9}{near(found / file)}", flush=True)


if __name__ == "__main__":
    main()
