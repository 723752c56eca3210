"""docs/clusters.md: commands that need no cluster are run, and its tables of settings agree with the code."""

import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import yaml
from torchx.cli import argparse_util
from torchx.cli.main import main as torchx

from sidestack.infra.clusters.config import KINDS, KubernetesCluster, SlurmOptions, load_cluster
from sidestack.infra.config import parse
from sidestack.infra.remote.urls import MIRROR_VARIABLE, SCHEMES, address, local_path
from sidestack.infra.schedulers import FACTORIES
from sidestack.pipelines import cronjob
from sidestack.pipelines.config import PipelineConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/clusters.md").read_text()
# These need a cluster, a container engine, an object store or hours.
NOT_RUN = (
    "docker ", "kubectl ", "make ", "cp ", "export ", "python -m pipelines.run ", "python -m ranker.inspect ",
    "python -m tests.infra.deploy.image ",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition(" #")[0].partition(" |")[0].split()) for line in lines if line.strip()]


RUN = [command for command in commands() if not command.startswith(NOT_RUN)]


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("torchx ")])
def test_dry_run_prints_its_job(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    assert "--dryrun" in words
    cluster = load_cluster(words[words.index("--cluster") + 1])
    for action in (argparse_util.torchxconfig_run, argparse_util.ArgOnceAction):  # they remember earlier arguments
        monkeypatch.setattr(action, "called_args", set())
    # The schedulers of this tree instead of those of the installed package.
    with mock.patch("torchx.runner.api.get_scheduler_factories", return_value=dict(FACTORIES)):
        torchx(words[1:])
    printed = capsys.readouterr().out
    assert cluster.scheduler_options.get("queue", "--partition=gpu") in printed
    assert "--nnodes 2 --nproc-per-node 8" in " ".join(printed.split())


def test_cron_job_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = (command for command in RUN if "pipelines.cronjob" in command)
    cronjob.main(shlex.split(command.removeprefix("python -m pipelines.cronjob ")))
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "CronJob"


def test_commands_are_either_run_or_listed_as_not_run() -> None:
    assert {command.split()[0] for command in RUN} == {"torchx", "python"}
    assert sum("torchx" in command for command in RUN) == 3 and len(RUN) == 4
    for name in re.findall(r"(?:-f|--env-file) ((?!-)\S+/\S+)", " ".join(commands())):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_example_run_files_are_valid(text: str) -> None:
    values = yaml.safe_load(text)
    values["run"]["cluster"] = "kubernetes"
    assert parse(PipelineConfig, values, "night.yaml").run.scheduler == "kubernetes"


def test_urls_on_the_page_are_those_that_the_code_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, str(tmp_path))
    part = PAGE[PAGE.index("| URL | credentials") :].partition("\n\n")[0]
    urls = re.findall(r"^\| `(\w+://\S+)`", part, re.MULTILINE)
    assert {url.partition("://")[0] for url in urls} == {*SCHEMES, "file"} - {"abfss"}
    assert all(address(local_path(url)) == url.removeprefix("file://") for url in urls)
    assert MIRROR_VARIABLE in PAGE


def test_page_documents_every_key_of_a_kubernetes_cluster() -> None:
    table = PAGE[PAGE.index("| key | what the pods get |") :].partition("\n\n")[0]
    documented = set(re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines())))
    assert documented == set(KubernetesCluster.model_fields) - {"scheduler"}


def test_page_documents_every_slurm_option() -> None:
    sentence = re.search(r"are those of `sbatch`: (.*?)\. `signal", PAGE, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(SlurmOptions.model_fields)


def test_page_names_every_shipped_cluster() -> None:
    shipped = {file.stem for file in (ROOT / "infra/clusters").glob("*.yaml")}
    assert all(f"`{name}`" in PAGE.partition("```yaml")[0] for name in shipped)
    assert {load_cluster(name).scheduler for name in shipped} == set(KINDS) - {"local_docker"}
