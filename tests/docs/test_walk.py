"""The paths of a batch and of a setting in docs/architecture.md are short, and their functions exist."""

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidestack.infra.config import load_section, plain, to_yaml
from sidestack.pipelines.config import read_config
from sidestack.pipelines.graph import ranker_stage, stages
from sidestack.ranker.budget import decide
from sidestack.ranker.config import RankerConfig
from tests.docs.pages import ROOT

MAX_HOPS = 10
SHARED = ("infra/shared_groups.py", "SharedGroups.read")
"""The function that reads a row group for the lanes that share it."""


BATCH, SETTING = "**One batch, from Parquet to its loss.**", "**One setting, from the run's file to its use.**"


def hops(heading: str = BATCH) -> list[tuple[str, str]]:
    """Return file and function of every step of a path, in order."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition(heading)[2].partition("\n**")[0].partition("\n#")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", section, re.M)


def function(file: str, name: str) -> Callable[..., Any]:
    module = importlib.import_module("sidestack." + file.removesuffix(".py").replace("/", "."))
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    assert inspect.isfunction(found), f"{file}:{name}"
    return found


@pytest.mark.parametrize("heading", [BATCH, SETTING])
def test_path_has_at_most_ten_existing_functions(heading: str) -> None:
    found = hops(heading)
    assert 5 < len(found) <= MAX_HOPS
    for file, name in found:
        assert (ROOT / file).is_file(), file
        assert function(file, name)


def test_functions_on_the_path_of_a_batch_are_called() -> None:
    """Each function is called in another one of the path, or in `StepRunner` or `SHARED`, which connect them."""
    callers = [
        ("ranker/step_runner.py", f"StepRunner.{name}") for name in ("run", "batches", "prefetched", "in_lockstep")
    ]
    sources = [inspect.getsource(function(*each)) for each in [*hops(), *callers, SHARED]]
    for place, (_, name) in enumerate(hops()):
        called = {"Ranker.forward": "_model_fwd(", "GlobalLoss.forward": "self.loss("}.get(
            name, f"{name.rpartition('.')[2]}("
        )
        others = sources[:place] + sources[place + 1 :]
        assert any(called in source for source in others), f"nothing calls {name}"


def test_setting_passes_unchanged_through_these_functions(tmp_path: Path) -> None:
    _, config = read_config(ROOT / "configs/complete_journey.yaml", ["ranker.training.batch_size=192"])
    materialize = next(stage for stage in stages(config) if stage.name == "materialize")
    section = ranker_stage(config, "side", materialize).config
    (tmp_path / "ranker.yaml").write_text(to_yaml({"ranker": plain(section)}))
    read = load_section(RankerConfig, tmp_path / "ranker.yaml", "ranker").resolved()
    assert (read.arm, decide(read, []).training.batch_size) == ("side", 192)
