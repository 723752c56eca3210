"""A stage that does next to nothing, for the tests of `run_stage`: every rank writes one number."""

from infra.config import Config
from infra.errors import DataError
from infra.stage import StageRun, run_stage


class TinyConfig(Config):
    number: int = 1
    fail_on_rank: int | None = None


def body(run: StageRun[TinyConfig]) -> None:
    if run.config.fail_on_rank == run.world.rank:
        raise DataError(f"numbers.parquet, row group 3: {run.config.number} is odd")
    (run.out / f"part-{run.world.rank}.txt").write_text(str(run.config.number))
    run.log.metrics(1, {"number": run.config.number})
    run.log.summary({"inputs": {name: path.name for name, path in run.inputs.items()}})
    run.facts["doubled"] = 2 * run.config.number


if __name__ == "__main__":
    run_stage("tiny", "encoder", TinyConfig, ["before", "arm.*"], body)
