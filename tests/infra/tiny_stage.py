"""A minimal stage for the tests of `run_stage`: every rank writes one number."""

from typing import Self

from sidestack.infra.checkpoint import Checkpoint
from sidestack.infra.config import Config
from sidestack.infra.errors import DataError
from sidestack.infra.stage import StageRun, run_stage


class TinyConfig(Config):
    number: int = 1
    fail_on_rank: int | None = None
    fail_after_checkpoint: bool = False
    variants: dict[str, int] = {}
    """Numbers by name; `variant` selects one, as the ranker's setting selects an arm."""
    variant: str = ""

    def resolved(self) -> Self:
        chosen = {name: number for name, number in self.variants.items() if name == self.variant}
        return self.model_copy(update={"number": chosen.get(self.variant, self.number), "variants": chosen})


def body(run: StageRun[TinyConfig]) -> None:
    if run.config.fail_on_rank == run.world.rank:
        raise DataError(f"numbers.parquet, row group 3: {run.config.number} is odd")
    if run.config.fail_after_checkpoint:
        resume_or_fail(run)
    (run.out / f"part-{run.world.rank}.txt").write_text(str(run.config.number))
    run.log.metrics(1, {"number": run.config.number})
    run.log.summary({"inputs": {name: path.name for name, path in run.inputs.items()}})
    run.facts["doubled"] = 2 * run.config.number


def resume_or_fail(run: StageRun[TinyConfig]) -> None:
    assert run.checkpoints is not None
    found = run.checkpoints.load()
    if found is None:
        run.checkpoints.save(Checkpoint(run.config.number, {}, {}, {}))
        raise DataError("failed after its checkpoint")
    run.facts["resumed_from"] = found.step


if __name__ == "__main__":
    run_stage("tiny", "encoder", TinyConfig, ["before", "arm.*"], body)
