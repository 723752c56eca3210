"""Commands, options, make targets, files and configuration keys that the documentation names exist."""

import argparse
import contextlib
import importlib
import inspect
import io
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from sidestack.infra.config import SECTIONS
from sidestack.infra.kinds import ByKind
from sidestack.pipelines.config import PipelineConfig, read_config
from tests.docs.pages import GUIDES, PLACEHOLDERS, ROOT, Command, blocks, commands, inline_code, prose

COMMANDS = list(dict.fromkeys(command for page in GUIDES for command in commands(page)))
FOLDERS = (
    "benchmarks",
    "components",
    "configs",
    "docs",
    "encoder",
    "infra",
    "pipelines",
    "ranker",
    "requirements",
    "tests",
)
OTHERS = {
    ".", "apt-get", "cd", "cp", "curl", "docker", "export", "git", "kubectl", "mlflow", "openssl", "pip",
    "spark-submit", "sudo", "journalctl", "scrontab", "squeue", "airflow",
}  # fmt: skip
"""Programs from outside this repository."""


class ParsedError(BaseException):
    """Raised when a program has parsed its arguments, to end it."""


def commands_of(*programs: str) -> list[Command]:
    return [command for command in COMMANDS if Path(command.words[0]).name in programs]


def without_brackets(words: Sequence[str]) -> list[str]:
    """Return arguments without the brackets around optional ones."""
    return [word if "=" in word or "{" in word else word.strip("[]") for word in words]


@contextlib.contextmanager
def parse_args_stops_the_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[argparse.Namespace]]:
    """Make every `parse_args` end the program that calls it; yield a list to which the parsed arguments are added."""
    original, found = argparse.ArgumentParser.parse_args, []

    def parse(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        found.append(original(self, args, namespace))
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    yield found


def parse_arguments(monkeypatch: pytest.MonkeyPatch, module: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Return the arguments parsed by a module's own parser.

    Raises:
        AssertionError: the module does not exist, parses no arguments, or refuses these.
    """
    monkeypatch.setattr("sys.argv", [module, *arguments])
    errors = io.StringIO()
    with parse_args_stops_the_program(monkeypatch) as found, contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except ParsedError:
            return found[0]
        except ImportError as error:
            raise AssertionError(f"python -m {module}: {error}") from error
        except SystemExit:
            raise AssertionError(errors.getvalue()) from None
    raise AssertionError(f"python -m {module} parsed no arguments")


def modules() -> list[tuple[Command, str, list[str]]]:
    """Return every `python -m MODULE ARGUMENTS` of our modules, also under torchrun."""
    found = []
    for command in commands_of("python", "torchrun"):
        words = list(command.words)
        if "-m" in words:
            at = words.index("-m") + 1
            if words[at].split(".")[0] in (*FOLDERS, "sidestack"):
                found.append((command, words[at], words[at + 1 :]))
    return found


def config_of(named: str | None) -> Path:
    """Return the run file that a command names if the repository has it, else the default run file."""
    file = ROOT / (named or "")
    return file if file.is_file() else ROOT / "configs/complete_journey.yaml"


# Programs that do not use argparse.
NO_PARSER = ("pytest", "tests.infra.deploy.image", "tests.components.golden")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # runpy, of an imported module
@pytest.mark.parametrize(
    ("command", "module", "arguments"),
    [pytest.param(*one, id=str(one[0])) for one in modules() if one[1] not in NO_PARSER],
)
def test_module_accepts_the_options(
    command: Command, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not arguments:  # the page names the module without arguments
        assert is_of_code(module)
        return
    parsed = parse_arguments(monkeypatch, module, without_brackets(arguments))
    overrides = [one for one in getattr(parsed, "set", None) or [] if not PLACEHOLDERS.fullmatch(one)]
    if overrides and not module.startswith("benchmarks."):
        named = getattr(parsed, "config", None)
        read_config(config_of(str(named) if named else None), overrides)


def makefile() -> tuple[set[str], set[str]]:
    """Return the Makefile's targets and the variables that it reads."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.M)), set(
        re.findall(r"\$[({](?:foreach s,\$\()?([A-Z_]+)", text)
    )


@pytest.mark.parametrize("command", [pytest.param(one, id=str(one)) for one in commands_of("make")])
def test_make_target_exists(command: Command) -> None:
    targets, variables = makefile()
    settings = dict(word.split("=", 1) for word in command.words[1:] if "=" in word)
    for word in command.words[1:]:
        assert "=" in word or word in targets, f"make {word}: no such target"
    assert set(settings) <= variables
    if "BENCH" in settings and not PLACEHOLDERS.fullmatch(settings["BENCH"]):
        name = ROOT / "benchmarks" / settings["BENCH"]
        assert name.with_suffix(".py").is_file() or (name / "__main__.py").is_file()
    overrides = [one for one in settings.get("SET", "").split() if "..." not in one and "a.b" not in one]
    if overrides and "replay" not in command.words:
        read_config(config_of(settings.get("CONFIG")), overrides)


def test_files_and_modules_of_the_makefile_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    files = set(re.findall(r"(?<![\w/.])(?:tests|configs|infra|docs|benchmarks)/[\w/.-]*\w", text))
    assert {"tests/pipelines/slurm", "configs/tables.yaml"} <= files
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
    modules = set(re.findall(r"-m ((?:pipelines|ranker|infra|tests|benchmarks)\.[\w.]*\w)", text))
    assert {"ranker.plan", "pipelines.studies.tables"} <= modules
    for module in sorted(modules):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module


def components() -> Iterator[tuple[Command, int]]:
    """Yield the commands that run a component, with the index of the component among their words."""
    for command in commands_of("torchx"):
        for at, word in enumerate(command.words):
            if word.startswith("components/"):
                yield command, at


@pytest.mark.parametrize(("command", "at"), [pytest.param(*one, id=str(one[0])) for one in components()])
def test_component_accepts_the_options(command: Command, at: int) -> None:
    file, _, name = command.words[at].partition(":")
    module = importlib.import_module("sidestack." + file.removesuffix(".py").replace("/", "."))
    known = set(inspect.signature(getattr(module, name)).parameters) - {"overrides"}
    assert {word[2:].partition("=")[0] for word in command.words[at:] if word.startswith("--")} <= known


@pytest.mark.parametrize("command", [pytest.param(one, id=str(one)) for one in commands_of("pytest")])
def test_marks_of_tests_are_known(command: Command, pytestconfig: pytest.Config) -> None:
    words = list(command.words)
    if "-m" in words:
        known = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
        assert set(re.findall(r"\w+", words[words.index("-m") + 1])) - {"not", "or", "and"} <= known


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in GUIDES])
def test_named_files_exist(page: Path) -> None:
    named = [word for command in commands(page) for before, word in pairwise(command.words) if before != "--out"]
    for word in [*named, *inline_code(page)]:
        path, _, name = word.rpartition("=")[2].removeprefix("./").partition(":")
        if "/" not in path or path.split("/")[0] not in FOLDERS or re.search(r"[*<>{} ]|\b[A-Z]{3,}\b", path):
            continue
        assert (ROOT / path.partition("::")[0]).exists(), f"`{word}`: no such file"
        if path.endswith(".py") and name.isidentifier():
            assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"`{word}`: {path} has no {name}"


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in GUIDES])
def test_code_is_fenced(page: Path) -> None:
    """Indented code blocks have no language, so their commands would not be found."""
    assert not re.search(r"^(?! *[-*\d])\S[^\n]*\n\n {4}\S", prose(page), re.M)


def test_every_program_is_known() -> None:
    ours = {"python", "make", "torchx", "torchrun", "pytest"}
    known = ours | OTHERS
    unknown = [one for one in COMMANDS if one.words[0] not in known and Path(one.words[0]).name not in known]
    assert not [str(command) for command in unknown if not (ROOT / command.words[0]).is_file()]


def has_key(kind: Any, keys: Sequence[str]) -> bool:
    """Return whether a type of the configuration has a setting under these keys; a mapping has any key."""
    if not keys or keys[0] == "...":
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(keys[0])
        if field is None:
            return False
        kinds = [model for note in field.metadata if isinstance(note, ByKind) for model in note.kinds().values()]
        return any(has_key(one, keys[1:]) for one in (field.annotation, *kinds))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return has_key(arguments[0], keys)
    if origin in (Union, UnionType):
        return any(has_key(one, keys) for one in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return has_key(arguments[1], keys[1:])
    return kind is Any


def is_of_code(dotted: str) -> bool:
    """Return whether a dotted name is one of our modules or a name in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            return length == len(parts) or parts[length] in file.read_text()
        if path.is_dir() and length == len(parts):
            return True
    return False


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in GUIDES])
def test_dotted_names_are_settings_or_code(page: Path) -> None:
    for code in inline_code(page):
        dotted = re.split(r"[=: ]", code)[0].rstrip(".")
        if dotted.endswith((".json", ".yaml", ".parquet")) or dotted.split(".")[0] not in SECTIONS:
            continue
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", dotted):
            assert has_key(PipelineConfig, dotted.split(".")) or is_of_code(dotted), (
                f"`{code}`: neither setting nor code"
            )


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in GUIDES])
def test_run_files_have_known_keys(page: Path) -> None:
    for language, text in blocks(page):
        values = yaml.safe_load(text) if language == "yaml" else None
        if isinstance(values, dict) and set(values) <= set(SECTIONS):
            for keys in _leaves(values):
                assert has_key(PipelineConfig, keys), f"{'.'.join(keys)}: no setting"


def _leaves(values: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*before, str(key)))
        else:
            yield (*before, str(key))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_wrong_option_or_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="--kofig"):
        parse_arguments(monkeypatch, "pipelines.run", ["--config", "FILE", "--kofig", "FILE"])
    assert has_key(PipelineConfig, ["encoder", "quantizer", "beam"])
    assert has_key(PipelineConfig, ["ranker", "arms", "any", "item"])
    assert not has_key(PipelineConfig, ["encoder", "quantiser", "kind"])
    assert is_of_code("infra.commit")
    assert not is_of_code("ranker.no_such_module")
