"""A profiled training writes a trace of every rank beside its output and ends with the weights of an unprofiled one."""

from pathlib import Path

from sidestack.infra.distributed import World
from sidestack.ranker.bundle import FOLDER
from tests.distributed import run_distributed
from tests.infra.test_profile import steps_in
from tests.ranker.dataset import write_dataset
from tests.ranker.test_resume import train_ranker


def train_both(world: World, dataset: Path, folder: Path) -> None:
    for name, steps in (("plain", 0), ("profiled", 3)):
        train_ranker(world, dataset, folder / name, "side", profile=steps, epochs=1)


def weights(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_profiling_two_ranks_does_not_change_weights(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", rows_a_day=192)
    run_distributed(train_both, dataset, tmp_path)
    plain, profiled = (weights(tmp_path / name / FOLDER) for name in ("plain", "profiled"))
    assert plain == profiled and plain
    for rank in range(2):
        file = tmp_path / f"profiled.profile/rank-{rank:05d}.json.gz"
        assert steps_in(file) == {"ProfilerStep#1", "ProfilerStep#2", "ProfilerStep#3"}
    assert not (tmp_path / "plain.profile").exists()
