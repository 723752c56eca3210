"""The way of a batch that docs/architecture.md shows: short, and of functions that exist."""

import importlib
import inspect
import re
from collections.abc import Callable
from functools import reduce
from typing import Any

from tests.docs.pages import ROOT

MOST_HOPS = 10


def hops() -> list[tuple[str, str]]:
    """Return file and function of every step, in order."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text.partition("**One batch, from Parquet to its loss.**")[2].partition("\n**")[0]
    return re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", section, re.M)


def function(file: str, name: str) -> Callable[..., Any]:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    found: Callable[..., Any] = reduce(getattr, name.split("."), module)
    return found


def test_a_batch_takes_at_most_ten_hops_each_a_function_that_exists() -> None:
    found = hops()
    assert 5 < len(found) <= MOST_HOPS
    for file, name in found:
        assert (ROOT / file).is_file(), file
        assert inspect.isfunction(function(file, name)), f"{file}:{name}"


def test_the_functions_that_put_the_hops_together_call_them() -> None:
    """Each hop is called, by name, in one of the other hops or in the two functions that put them together."""
    callers = [*hops(), ("ranker/progress.py", "Progress"), ("infra/shared_groups.py", "SharedGroups")]
    sources = [inspect.getsource(function(*caller)) for caller in callers]
    for place, (_, name) in enumerate(hops()):
        called = {"Ranker.forward": "_model_fwd(", "GlobalLoss.forward": "self.loss("}.get(
            name, f"{name.rpartition('.')[2]}("
        )
        others = sources[:place] + sources[place + 1 :]
        assert any(called in source for source in others), f"nothing calls {name}"
