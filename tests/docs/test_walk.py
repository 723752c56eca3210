"""The path of a batch in docs/architecture.md is short, and its functions exist and are called."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

from tests.docs.pages import ROOT

MAX_HOPS = 10
SHARED = ("infra/shared_groups.py", "SharedGroups.read")
"""The function that reads a row group for the lanes that share it."""


def hops() -> list[tuple[str, str]]:
    """Return file and function of every step of the path, in order."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("**One batch, from Parquet to its loss.**")[2].partition("\n**")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", section, re.M)


def function(file: str, name: str) -> Callable[..., Any]:
    module = importlib.import_module("sidestack." + file.removesuffix(".py").replace("/", "."))
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    assert inspect.isfunction(found), f"{file}:{name}"
    return found


def test_path_of_a_batch_has_at_most_ten_existing_functions() -> None:
    found = hops()
    assert 5 < len(found) <= MAX_HOPS
    for file, name in found:
        assert (ROOT / file).is_file(), file
        assert function(file, name)


def test_functions_on_the_path_of_a_batch_are_called() -> None:
    """Each function is called in another one of the path, or in `Progress` or `SHARED`, which connect them."""
    callers = [("ranker/progress.py", f"Progress.{name}") for name in ("over", "batches", "ahead", "agreed")]
    sources = [inspect.getsource(function(*each)) for each in [*hops(), *callers, SHARED]]
    for place, (_, name) in enumerate(hops()):
        called = {"Ranker.forward": "_model_fwd(", "GlobalLoss.forward": "self.loss("}.get(
            name, f"{name.rpartition('.')[2]}("
        )
        others = sources[:place] + sources[place + 1 :]
        assert any(called in source for source in others), f"nothing calls {name}"
