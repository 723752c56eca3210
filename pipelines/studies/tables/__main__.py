"""`python -m pipelines.studies.tables --config configs/tables.yaml [--only table_4 ...] [--set section.key=value]`.

Each table in section `tables` is a pipeline run with the table's arms: an MLflow parent run with its own report. Tables
share common stages. At the end, one page shows all tables, with our figures next to the paper's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from sidestack.infra.config import plain
from sidestack.infra.errors import ConfigError
from sidestack.infra.remote.copies import put
from sidestack.pipelines.config import WITHOUT_BASELINE, PipelineConfig, read_config
from sidestack.pipelines.execution import run_dir
from sidestack.pipelines.graph import stages
from sidestack.pipelines.job_log import log_line
from sidestack.pipelines.report.comparison import Comparison
from sidestack.pipelines.run import command_line, exit_status, relative_to_cwd, run_stages
from sidestack.pipelines.studies.tables.page import as_page, as_text

PAGE_FILE = "tables.md"


def make_tables(config_file: Path, overrides: Sequence[str], only: Sequence[str]) -> Path:
    """Run the tables one after another and write their page.

    Args:
        config_file: the run's YAML file. overrides: dotted `section.key=value`.
        only: names of tables; empty: all.

    Returns:
        the page.

    Raises:
        ConfigError: the file has no such table. SidestackError, StopSignal: see `pipelines.run.run_pipeline`.
    """
    _, config = read_config(config_file, overrides)
    for name in only:
        if name not in config.tables:
            known = ", ".join(config.tables) or "none"
            raise ConfigError(f"{config_file.name}.tables: {name!r} is unknown; tables are {known}")
    compared = {name: _compared(config_file, overrides, config, name) for name in only or config.tables}
    found = {name: Comparison.read(path) for name, path in compared.items()}
    page = run_dir(config.run) / PAGE_FILE
    text = as_page(config.tables, found, {name: path.name for name, path in compared.items()})
    page.write_text(text, encoding="utf-8")
    page.with_suffix(".json").write_text(_as_json(found), encoding="utf-8")
    for file in (page, page.with_suffix(".json")):
        put(file)
    print(as_text(config.tables, found))
    return page


def _compared(config_file: Path, overrides: Sequence[str], config: PipelineConfig, name: str) -> Path:
    table = config.tables[name]
    log_line("tables", f"{name}: {table.title}")
    chosen = [f"run.arms={json.dumps(list(table.arms))}", f"compare.reference={table.reference}", WITHOUT_BASELINE]
    values, of_table = read_config(config_file, [*overrides, *chosen])
    return run_stages(stages(of_table), of_table.run, values, plain(of_table), name)


def _as_json(found: dict[str, Comparison]) -> str:
    return json.dumps({name: one.model_dump(mode="json", exclude={"encoder"}) for name, one in found.items()}, indent=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: 1 after an error, 128 + the signal's number after a signal.
    """
    parser = command_line(
        "pipelines.studies.tables", "The papers' tables, those of section tables, ours beside theirs."
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TABLE", help="which of its tables; default: all")
    arguments = parser.parse_args(argv)
    with exit_status():
        print(f"page  {relative_to_cwd(make_tables(arguments.config, arguments.set, arguments.only))}", flush=True)


if __name__ == "__main__":
    main()
