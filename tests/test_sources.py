"""What no source file does: unpickle, run text as code, hand text to a shell, read text in the machine's encoding."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from sidestack.infra.code import ROOT

PACKAGES = ("infra", "encoder", "ranker", "components", "pipelines", "benchmarks", "tests")

UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "compile": "makes code of text",
    "numpy.load": "unpickles with allow_pickle",
    "torch.load": "unpickles without weights_only",
    "torch.jit.load": "runs what the file says",
    "torch.hub.load": "runs what was fetched",
    "torch.export.load": "unpickles example inputs",
    "torch.distributed.all_gather_object": "unpickles what other ranks send",
    "torch.distributed.broadcast_object_list": "unpickles what other ranks send",
    "torch.distributed.gather_object": "unpickles what other ranks send",
    "torch.distributed.scatter_object_list": "unpickles what other ranks send",
    "pandas.read_pickle": "unpickles",
    "mlflow.pyfunc.load_model": "unpickles what MLmodel names, unless MLflow is told not to",
    "yaml.load": "makes what tags say",
    "yaml.load_all": "makes what tags say",
    "yaml.full_load": "makes what tags say",
    "yaml.unsafe_load": "makes what tags say",
    "os.system": "hands text to a shell",
    "os.popen": "hands text to a shell",
    "subprocess.getoutput": "hands text to a shell",
    "subprocess.getstatusoutput": "hands text to a shell",
    "asyncio.create_subprocess_shell": "hands text to a shell",
}
"""Calls by full name, and why they are looked at."""

ALLOWED: Mapping[tuple[str, str], str] = {
    ("infra/config.py", "yaml.load"): "its loader is a SafeLoader that refuses more",
    ("infra/distributed.py", "torch.distributed.all_gather_object"): "ranks of one job, over its own connections",
    ("infra/distributed.py", "torch.distributed.broadcast_object_list"): "ranks of one job, over its own connections",
    ("infra/served.py", "mlflow.pyfunc.load_model"): "MLflow is told to refuse pickles: see refusing_pickles",
    ("tests/test_planted_pickles.py", "pickle"): "makes the pickles that are planted",
    ("tests/test_planted_pickles.py", "torch.load"): "shows that they would run",
    ("tests/test_planted_pickles.py", "numpy.load"): "shows that they would run",
    ("tests/ranker/test_plan.py", "eval"): "a sum of products that the code under test has printed",
}
"""By file and call, why it is right there."""


def sources() -> list[str]:
    return sorted(str(file.relative_to(ROOT)) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def nodes(text: str) -> list[ast.Call | ast.Import | ast.ImportFrom]:
    """Return a module's calls and imports."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call | ast.Import | ast.ImportFrom)]


def imported_names(found: list[ast.Call | ast.Import | ast.ImportFrom]) -> dict[str, str]:
    """Return what a module's names stand for: `np` for numpy, `load` for torch.load."""
    names = {}
    for node in found:
        if isinstance(node, ast.Import):
            for one in node.names:
                names[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return names


def full_name(node: ast.expr, names: Mapping[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    """Return a keyword's constant; None where it is not given, the node itself where it is no constant."""
    found = next((one.value for one in call.keywords if one.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else found


def faults(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, name and reason of everything that is looked at."""
    found = nodes(text)
    names = imported_names(found)
    for node in found:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for name in [module] if module else [one.name for one in node.names]:
                if name.partition(".")[0] in UNPICKLING_MODULES:
                    yield node.lineno, name, "unpickles"
        if isinstance(node, ast.Call):
            name = full_name(node.func, names)
            is_safe = (name == "numpy.load" and keyword(node, "allow_pickle") in (None, False)) or (
                name == "torch.load" and keyword(node, "weights_only") is True
            )
            if name in FORBIDDEN and not is_safe:
                yield node.lineno, name, FORBIDDEN[name]
            if keyword(node, "shell") not in (None, False):
                yield node.lineno, f"{name}(shell=)", "hands text to a shell"


def unnamed_encodings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line of every text file that is read or written in the encoding of whatever locale there is."""
    for node in nodes(text):
        if not isinstance(node, ast.Call) or keyword(node, "encoding") is not None:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        is_path = isinstance(node.func, ast.Attribute)
        if name in ("read_text", "write_text"):
            yield node.lineno, name
        if name == "open":
            mode = next((arg for arg in node.args[0 if is_path else 1 :]), None)
            value = mode.value if isinstance(mode, ast.Constant) else keyword(node, "mode")
            is_text = isinstance(value, str) and set(value) <= set("rwax+t")
            if is_text or (mode is None and not is_path):
                yield node.lineno, name


def test_no_source_unpickles_runs_text_or_needs_a_shell() -> None:
    found, used = [], set()
    for file in sources():
        for line, name, reason in faults((ROOT / file).read_text(encoding="utf-8")):
            if (file, name) in ALLOWED:
                used.add((file, name))
            else:
                found.append(f"{file}:{line}: {name} {reason}")
    assert not found, "\n".join(found)
    assert used == ALLOWED.keys(), "an exception that nothing needs any more"


def test_every_text_file_is_read_and_written_as_utf8() -> None:
    found = [
        f"{file}:{line}: {name}"
        for file in sources()
        if not file.startswith("tests/")
        for line, name in unnamed_encodings((ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import torch\ntorch.load(file)", "torch.load"),
        ("import torch\ntorch.load(file, weights_only=False)", "torch.load"),
        ("from torch import load as read\nread(file)", "torch.load"),
        ("import numpy as np\nnp.load(file, allow_pickle=True)", "numpy.load"),
        ("import numpy as np\nnp.load(file, allow_pickle=flag)", "numpy.load"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "yaml.load"),
        ("import subprocess\nsubprocess.run(command, shell=True)", "subprocess.run(shell=)"),
        ("import os\nos.system(command)", "os.system"),
        ("eval(text)", "eval"),
        ("import mlflow.pyfunc\nmlflow.pyfunc.load_model(path)", "mlflow.pyfunc.load_model"),
    ],
)
def test_what_is_forbidden_is_found(text: str, name: str) -> None:
    assert [one for _, one, _ in faults(text)] == [name]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load(file, weights_only=True)",
        "import numpy as np\nnp.load(file)\nnp.load(file, allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(command, shell=False)",
        "model.eval()",
        "import re\nre.compile(text)",
    ],
)
def test_what_is_safe_is_not(text: str) -> None:
    assert not list(faults(text))


def test_encodings_that_are_not_named_are_found() -> None:
    text = "a.read_text()\nb.write_text(x)\nopen(c)\nd.open('w')\nopen(e, 'rb')\nf.open('rb')\nreader.open(1)"
    assert [line for line, _ in unnamed_encodings(text)] == [1, 2, 3, 4]
    assert not list(unnamed_encodings("a.read_text(encoding='utf-8')\nopen(c, encoding='utf-8')"))


def test_the_list_of_sources_is_not_empty() -> None:
    assert {"infra/config.py", "ranker/train.py", "tests/test_sources.py"} <= set(sources())
    assert all(Path(ROOT / file).is_file() for file in sources())
