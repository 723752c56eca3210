"""Files of clusters: their settings, defaults and error messages."""

from pathlib import Path

import pytest

from sidestack.infra.clusters.config import (
    KINDS,
    SHIPPED,
    KubernetesCluster,
    cluster_of,
    load_cluster,
    metadata_of,
    with_options,
)
from sidestack.infra.errors import ConfigError
from sidestack.infra.schedulers import FACTORIES

HEAD = "scheduler: kubernetes\nimage: r/i:1\noptions: {queue: q}\n"


def cluster_file(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.yaml")))
def test_shipped_clusters_are_valid_and_restored_from_metadata(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster_of(metadata_of(cluster), cluster.scheduler) == cluster


def test_every_scheduler_has_a_model() -> None:
    assert set(KINDS) == set(FACTORIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheduler: slurm\noptions: {partitoin: gpu}\n", r"mine.yaml.options.partitoin: unknown .* 'partition'\?"),
        ("scheduler: slurmm\n", r"mine.yaml.scheduler: 'slurmm' is unknown; .* did you mean 'slurm'\?"),
        ("image: x\n", "mine.yaml.scheduler: is missing; schedulers are local_cwd, "),
        ("scheduler: slurm\nimage: x\n", "mine.yaml.image: unknown key"),
        ("scheduler: kubernetes\nimage: x\n", "mine.yaml.options: Field required"),
        (HEAD + "digest: sha256:12\n", "mine.yaml.digest: .*pattern"),
        (HEAD + "storage: [{path: /a}]\n", "mine.yaml.storage.0: must have either `host` or `claim`"),
        (HEAD + "storage: [{path: a, claim: c}]\n", "mine.yaml.storage.0.path: .*pattern"),
        (HEAD + "tolerations: [{key: a, efect: NoSchedule}]\n", r"tolerations.0.efect: unknown key; .* 'effect'\?"),
        (HEAD + "tolerations: [{key: a, value: b}]\n", "tolerations.0: operator Exists: takes no value"),
        (HEAD + "secrets: {A: {nme: x, key: y}}\n", r"secrets.A.nme: unknown key; did you mean 'name'\?"),
        (HEAD + "policies: {PodFailde: AbortJob}\n", "policies.PodFailde"),
        (HEAD + "security: {user: 0}\n", "security.user: .*greater than 0"),
        (HEAD + "image: again\n", "key 'image' occurs twice"),
        ("scheduler: aws_batch\nimage: x\noptions: {queue: q}\nsecrets: {A: 'arn:x'}\n", "options.execution_role_arn"),
    ],
)  # fmt: skip
def test_error_names_file_key_and_rule(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster(cluster_file(tmp_path, text))


def test_unknown_name_is_reported_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'kubernets': no such name; .* did you mean 'kubernetes'\?"):
        load_cluster("kubernets")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(str(tmp_path / "away.yaml"))


def test_digest_pins_the_image(tmp_path: Path) -> None:
    digest = "sha256:" + "0a" * 32
    assert load_cluster(cluster_file(tmp_path, HEAD)).image_reference == "r/i:1"
    pinned = load_cluster(cluster_file(tmp_path, f"{HEAD}digest: {digest}\n"))
    assert pinned.image_reference == f"r/i:1@{digest}"


def test_storage_becomes_mounts(tmp_path: Path) -> None:
    text = HEAD + "storage: [{claim: c, path: /a}, {host: /h, path: /b, read_only: true}]\n"
    expected = ("type=volume", "src=c", "dst=/a", "type=bind", "src=/h", "dst=/b", "readonly")
    assert load_cluster(cluster_file(tmp_path, text)).mounts == expected


def test_given_options_override_those_of_the_cluster() -> None:
    cluster = load_cluster("kubernetes")
    assert isinstance(cluster, KubernetesCluster)
    options = with_options(cluster, {"queue": "mine", "namespace": None, "image_repo": None})
    assert (options["queue"], options["namespace"], options["image_repo"]) == ("mine", "training", None)


def test_cluster_of_another_scheduler_is_refused() -> None:
    with pytest.raises(ConfigError, match="its scheduler is 'slurm'; this job goes to 'kubernetes'"):
        cluster_of(metadata_of(load_cluster("slurm")), "kubernetes")
