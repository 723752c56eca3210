"""`python -m pipelines.track --config FILE`: send the tracking store what it missed while unavailable."""

from collections.abc import Sequence
from pathlib import Path

from sidestack.infra.errors import SidestackError, StageError
from sidestack.infra.journal import journals
from sidestack.infra.masking import masked, one_line
from sidestack.infra.mlflow_store import connect, longer_timeouts, use_store
from sidestack.pipelines.config import read_config
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.run import command_line, exit_status, run_lock
from sidestack.pipelines.tracker import send_unsent


def track(config_file: Path, overrides: Sequence[str] = ()) -> int:
    """Send the store what it lacks of every MLflow run in a run's folder.

    Args:
        config_file: the run's YAML file. overrides: dotted `section.key=value`.

    Returns:
        the number of MLflow runs that were sent.

    Raises:
        ConfigError: the config is invalid.
        AlreadyRunningError: a driver is running in the folder; it sends the records itself.
        StageError: the store does not answer or rejects the records.
    """
    _, config = read_config(config_file, overrides)
    folder, runs_dir = run_dir(config.run), config.run.runs_dir
    uri = masked(use_store(runs_dir))
    with run_lock(folder), longer_timeouts():
        unsent = [journal for journal in journals(folder) if not journal.entries.is_sent]
        try:
            client = connect()
            for journal in unsent:
                send_unsent(client, journal, runs_dir)
        except SidestackError:
            raise
        except Exception as error:
            raise StageError(f"{uri}: {one_line(error)}; what was not sent stays in {folder}") from error
    return len(unsent)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error.
    """
    arguments = command_line("pipelines.track", "Send MLflow what it missed while it was away.").parse_args(argv)
    with exit_status():
        print(f"runs sent: {track(arguments.config, arguments.set)}")


if __name__ == "__main__":
    main()
