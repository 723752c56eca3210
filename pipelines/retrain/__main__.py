"""`python -m pipelines.retrain --config FILE [--from DATE --to DATE] [--dry-run]`, `... status`, `... rollback`.

A scheduler may call it at any rate: a call resumes the running cycle or begins one on new dates. If there is nothing to
do, or another call is running, it prints this and exits with status 0.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta

from sidestack.infra.errors import ConfigError
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.environment import require_secrets
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.retrain.cycle import Retraining
from sidestack.pipelines.retrain.dry_run import dry_run
from sidestack.pipelines.retrain.ledger import Ledger
from sidestack.pipelines.retrain.rollback import roll_back
from sidestack.pipelines.retrain.text_tables import status_table
from sidestack.pipelines.run import (
    AlreadyRunningError,
    command_line,
    exit_status,
    launcher_of,
    raise_on_signals,
    run_lock,
)


def retrain(config: PipelineConfig, as_ofs: Sequence[date | None]) -> None:
    """Run one cycle for each date if it is due; without dates, one cycle on all that has arrived.

    Args:
        config: the run's. as_ofs: for each cycle, the date at which the log is cut (exclusive); None: not cut.

    Raises:
        SidestackError, StopSignal: a stage failed or was stopped; the next call resumes.
        AlreadyRunningError: another call is running.
    """
    with opened(config) as retraining, raise_on_signals():
        if retraining.ledger.under_way is not None:
            retraining.step()
        for as_of in as_ofs:
            retraining.step(as_of)
        retraining.publish()


@contextmanager
def opened(config: PipelineConfig) -> Iterator[Retraining]:
    """Lock a run for this call.

    Raises:
        AlreadyRunningError: another call is running.
        ConfigError: the scheduler refuses an option, or a secret is not set.
    """
    run = config.run
    require_secrets(run)
    with run_lock(run_dir(run)):
        launcher = launcher_of(run)
        try:
            yield Retraining(config, launcher)
        finally:
            launcher.close()


def backfill_dates(first: date, last: date, days: int) -> Iterator[date]:
    """Yield the ends of a backfill's cycles: the day after the first date, then at intervals of `days`.

    Args:
        first, last: newest date of the first and of the last cycle.
        days: between two cycles.

    Raises:
        ConfigError: the last is before the first.
    """
    if last < first:
        raise ConfigError(f"--to {last}: is before --from {first}")
    while first <= last:
        yield first + timedelta(days=1)
        first += timedelta(days=days)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error, 128 + the signal's number after a signal.
    """
    arguments = _parser().parse_args(argv)
    with exit_status():
        _, config = read_config(arguments.config, arguments.set)
        match arguments.command:
            case "status":
                print(status_table(Ledger(run_dir(config.run))))
            case "rollback":
                with opened(config) as retraining:
                    roll_back(retraining, arguments.version)
            case _ if arguments.dry_run:
                with opened(config) as retraining:
                    dry_run(retraining)
            case _:
                try:
                    retrain(config, _as_ofs(arguments, config))
                except AlreadyRunningError as error:
                    log_line("retrain", f"{error}; this call leaves")


def _as_ofs(arguments: argparse.Namespace, config: PipelineConfig) -> list[date | None]:
    first, last = arguments.first, arguments.last
    if (first is None) != (last is None):
        raise ConfigError("--from and --to: go together")
    return [None] if first is None else list(backfill_dates(first, last, config.retrain.every_days))


def _parser() -> argparse.ArgumentParser:
    parser = command_line(
        "pipelines.retrain", "Retrain encoder and ranker on what has arrived; promote what is better."
    )
    parser.add_argument("command", nargs="?", choices=["run", "status", "rollback"], default="run")
    parser.add_argument("--from", dest="first", type=date.fromisoformat, metavar="DATE", help="backfill from this date")
    parser.add_argument("--to", dest="last", type=date.fromisoformat, metavar="DATE", help="backfill to this date")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and why; do nothing")
    parser.add_argument(
        "--version", type=int, metavar="CYCLE", help="rollback: to the version of this cycle; by default the one before"
    )
    return parser


if __name__ == "__main__":
    main()
