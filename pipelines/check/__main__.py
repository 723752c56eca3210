"""`python -m pipelines.check --init FOLDER [--out run.yaml]`, then `python -m pipelines.check --config run.yaml`.

The first looks at the raw files of a folder and writes a configuration for them. The second reads a configuration's raw
log, names all its faults at once, and says what it holds and about what a run will take. Nothing is trained.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from sidestack.infra.console import wide_console
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.remote.urls import local_argument, path_argument
from sidestack.pipelines.check.estimate import estimates, warnings
from sidestack.pipelines.check.guess import as_yaml, guess_config, tables_in
from sidestack.pipelines.check.profile import Profile, faults, profile
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.prepare.log.config import LogConfig
from sidestack.pipelines.prepare.log.files import raw_files
from sidestack.pipelines.prepare.log.on_duckdb import database
from sidestack.pipelines.prepare.remote import fetch_source
from sidestack.pipelines.run import exit_status


def init(folder: Path, out: Path) -> None:
    """Guess a configuration for the files of a folder, and write it.

    Raises:
        DataError: there is no table of events. ConfigError: `out` exists already.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; choose another --out")
    with TemporaryDirectory() as scratch, database(Path(scratch)) as connection:
        tables = tables_in(folder, connection)
    out.write_text(as_yaml(guess_config(tables, out.stem)), encoding="utf-8")
    print(f"{out}: a first configuration of {len(tables)} tables; look through it, then")
    print(f"  python -m sidestack.pipelines.check --config {out}")


def check(config_file: Path, overrides: list[str]) -> None:
    """Profile a configuration's raw log, and print it.

    Raises:
        ConfigError: the configuration's source is not a raw log. DataError: lists all faults of the log.
    """
    _, config = read_config(config_file, overrides)
    source = config.prepare.source
    if not isinstance(source, LogConfig):
        raise ConfigError(
            f"{config_file}: prepare.source.kind: only a raw log (kind: log) is checked, not {source.kind}"
        )
    fetch_source(source)
    files = raw_files(source, config.prepare.identity_cache)
    with TemporaryDirectory() as scratch, database(Path(scratch)) as connection:
        found = faults(source, files, connection)
        if found:
            raise DataError("\n".join([f"the raw log has {len(found)} faults:", *found]))
        show(profile(source, files, connection), config)


def show(found: Profile, config: PipelineConfig) -> None:
    """Print a profile, the estimated cost of a run, and warnings."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in [*_lines(found), ("", ""), *estimates(found, config)]:
        table.add_row(name, value)
    console = Console(highlight=False)
    wide_console().print(table)
    for warning in warnings(found, config):
        console.print(f"warning: {warning}", soft_wrap=True)


def _lines(found: Profile) -> list[tuple[str, str]]:
    lines = [
        ("events", f"{found.rows:,} from {found.first} to {found.last}, {found.num_days:,} dates"),
        ("users, items", f"{found.users:,} and {found.items:,}"),
    ]
    if found.train is not None and found.test is not None:
        lines.append(("train, test", f"{found.train[0]} to {found.train[1]}, {found.test[0]} to {found.test[1]}"))
    for name, task in found.tasks.items():
        rate = f"{task.positives:,} positives ({task.positives / found.seen:.2%}), {task.test_positives:,} to test"
        lines.append((f"task {name}", f"{rate}; {task.both:.0%} of users have both labels"))
    if found.listed is not None:
        lines.append(("catalogue", f"{found.listed:.1%} of events are of items in it; {found.texts:,} different texts"))
    if found.cold is not None:
        lines.append(("cold items", f"{found.cold:.1%} of test events are of items not seen before the test dates"))
    lines.append(("ties", f"{found.ties:.1%} of events share user and time with another (they are one request)"))
    if found.read < found.files:
        lines.append(("sample", f"all but events and dates is of {found.read:,} of {found.files:,} files"))
    return lines


def main() -> None:
    """Run the command; print an error as one message on stderr."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.check", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--init", type=local_argument, metavar="FOLDER", help="guess a configuration for a folder of raw files"
    )
    what.add_argument("--config", type=path_argument, help="a run's configuration, whose raw log is looked at")
    parser.add_argument("--out", type=local_argument, default=Path("run.yaml"), help="where --init writes (run.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in pipelines.run")
    arguments = parser.parse_args()
    with exit_status():
        if arguments.init is not None:
            init(arguments.init, arguments.out)
        else:
            check(arguments.config, arguments.set)


if __name__ == "__main__":
    main()
