"""A run's file is checked as a whole, before anything is launched."""

from typing import Any

import pytest
import torch

from sidestack.components.torchrun import Launch, app
from sidestack.encoder.quantizers import OWN
from sidestack.infra.clusters.config import load_cluster
from sidestack.infra.code import ROOT
from sidestack.infra.config import parse, plain
from sidestack.infra.errors import ConfigError
from sidestack.pipelines.config import PipelineConfig, read_config
from sidestack.pipelines.graph import stages
from sidestack.pipelines.run_config import RunConfig

MINIMAL = {"run": {"name": "night"}}


def at_a_url(**source: Any) -> dict[str, Any]:
    """Return the configuration of a raw log and a run in an object store."""
    columns = {"path": "s3://bucket/events", "user": "u", "item": "i", "time": "t"}
    log = {"kind": "log", "events": columns, "tasks": {"click": {}}, **source}
    return {"prepare": {"source": log}, "run": {"name": "night", "runs_dir": "s3://bucket/runs"}}


def test_a_name_is_the_only_required_setting() -> None:
    config = parse(PipelineConfig, MINIMAL, "c.yaml")
    assert config.run.scheduler == "local_cwd"
    assert (config.run.launch.compare.ranks, config.run.launch.ranker.ranks) == (1, 2)
    assert config.arms == tuple(config.ranker.arms)


def test_two_replicates_are_the_default_unless_encoders_are_given() -> None:
    given = {"sid": "runs/night/encoder/0123456789ab"}
    for run, replicates in (({}, 2), ({"encoders": given}, 1), ({"encoders": {}}, 2), ({"replicates": 1}, 1)):
        config = parse(PipelineConfig, {"run": {"name": "night", **run}}, "c.yaml")
        assert config.run.replicates == replicates
        assert sum(stage.name == "encoder" for stage in stages(config)) == replicates
        again = parse(PipelineConfig, plain(config), "c.yaml")
        assert again == config


def test_partial_launch_keeps_the_other_defaults() -> None:
    values = {"run": {"name": "n", "launch": {"compare": {"cpu": 8}, "ranker": {"nodes": 4}}}}
    launch = parse(PipelineConfig, values, "c.yaml").run.launch
    assert (launch.compare.ranks, launch.compare.cpu) == (1, 8)
    assert (launch.ranker.nodes, launch.ranker.ranks) == (4, 2)


def run_of(**run: Any) -> RunConfig:
    return parse(PipelineConfig, {"run": {"name": "n", **run}}, "c.yaml").run


def test_cluster_supplies_what_the_run_does_not_set() -> None:
    run = run_of(cluster="kubernetes")
    cluster = load_cluster("kubernetes")
    assert (run.scheduler, run.image, run.mounts) == ("kubernetes", cluster.image_reference, cluster.mounts)
    assert run.scheduler_options == cluster.scheduler_options
    assert (run.launch.ranker.cpu, run.launch.ranker.memory_mb, run.launch.ranker.gpu) == (64, 400000, 8)
    assert run.launch.ranker.ranks == 8, "a rank for each GPU"
    assert (run.launch.compare.gpu, run.launch.compare.ranks, run.launch.prepare.gpu) == (0, 1, 0)
    again = parse(RunConfig, plain(run), "c.yaml")
    assert again == run


def test_settings_of_the_run_override_its_cluster() -> None:
    run = run_of(
        cluster="kubernetes", image="mine:1", scheduler_options={"queue": "mine"},
        launch={"ranker": {"gpu": 4, "nodes": 2}, "encoder": {"gpu": 0}},
    )  # fmt: skip
    assert (run.image, run.scheduler_options["queue"]) == ("mine:1", "mine")
    assert run.scheduler_options["namespace"] == "training"
    assert (run.launch.ranker.gpu, run.launch.ranker.ranks, run.launch.ranker.cpu) == (4, 4, 64)
    assert (run.launch.encoder.gpu, run.launch.encoder.ranks) == (0, 2)


def test_local_rank_count_is_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for run in (run_of(), run_of(cluster="laptop")):
        assert (run.launch.ranker.gpu, run.launch.ranker.ranks) == (4, 4)
        assert (run.launch.prepare.gpu, run.launch.prepare.ranks) == (0, 2)
    assert run_of(scheduler="slurm").launch.ranker.gpu == 0, "the login node's GPUs are not the job's"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"cluster": "kubernets"}, r"'kubernets': no such name; .* did you mean 'kubernetes'\?"),
        ({"cluster": "slurm", "scheduler": "local_cwd"}, "scheduler 'local_cwd': the scheduler of slurm is 'slurm'"),
        ({"launch": {"ranker": {"gpu": 1, "ranks": 2}}}, "launch.ranker: ranks 2 a node: are more than its GPUs"),
        ({"launch": {"rankr": {}}}, r"launch.rankr: unknown key; did you mean 'ranker'\?"),
        ({"launch": 3}, "launch"),
        (
            {"scheduler": "slurm", "scheduler_options": {"partitoin": "gpu"}},
            r"scheduler_options.partitoin: slurm has no such option; did you mean 'partition'\?",
        ),
        ({"scheduler": "aws_batch"}, "needs scheduler_options.queue, or a cluster's file"),
    ],
)
def test_invalid_cluster_or_launch_is_named(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(**run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"c\.yaml\.run: "),
        ({"run": {"name": "a/b"}}, r"c\.yaml\.run\.name: .*'a/b'"),
        ({"run": {"name": ".."}}, r"c\.yaml\.run\.name"),
        ({"run": {"name": "a b"}}, r"c\.yaml\.run\.name: must be of letters, .*'a b'"),
        ({"run": {"name": "a\n"}}, r"c\.yaml\.run\.name: must be of letters"),
        ({"run": {"name": "a" * 101}}, r"c\.yaml\.run\.name: must be of letters, digits, _, \. and -, 100 at most"),
        ({"run": {"name": 1}}, r"c\.yaml\.run\.name: .*string \(value: 1\)$"),
        ({"run": {"name": "n", "scheduler": "lsf"}}, r"c\.yaml\.run\.scheduler: .*'lsf'"),
        ({"run": {"name": "n", "rank": 2}}, r"c\.yaml\.run\.rank: unknown key"),
        ({"run": {"name": "n", "launch": {"ranker": {"ranks": 0}}}}, r"run\.launch\.ranker\.ranks"),
        ({**MINIMAL, "encoder": {"no_such": 1}}, r"c\.yaml\.encoder\.no_such: unknown key"),
        ({**MINIMAL, "ranker": {"arm": "magic"}}, r"arm 'magic' is unknown"),
        ({"run": {"name": "n", "arms": ["none", "magic"]}}, r"'magic' is unknown"),
        (
            {
                **MINIMAL,
                "ranker": {"arms": {"none": {"overlay": {"model": {"history": {"heads": {"x": 1}}}}}}, "arm": "none"},
            },
            r"ranker \(arm 'none'\)\.model\.history\.heads: .*integer",
        ),
        ({"run": {"name": "n", "arms": ["none", "none"]}}, r"names an arm twice"),
        ({"run": {"name": "n", "arms": ["side"]}}, r"compare\.reference 'none': not trained"),
        ({**MINIMAL, "ranker": {"arms": {"../x": {}}, "arm": "../x"}}, r"arms\.\.\./x: must be of letters"),
        ({**MINIMAL, "ranker": {"arms": {"none-r1": {}}, "arm": "none-r1"}}, r"arms\.none-r1: .*must not end as"),
        # Also of an arm that this run does not train: it may be trained by hand.
        (
            {"ranker": {"arms": {"none": {}, "../x": {}}, "arm": "none"}, "run": {"name": "n", "arms": ["none"]}},
            "must be of",
        ),
        (
            {"run": {"name": "n", "scheduler_options": {"partition": "a\n#SBATCH --wrap=x"}}},
            r"partition: must be one line",
        ),
        ({"run": {"name": "n", "scheduler_options": {"a\nb": "x"}}}, r"must be one line"),
        ({"run": {"name": "n", "image": "a b"}}, r"run\.image: must be one word"),
        ({"run": {"name": "n", "env": {"A=B": "x"}}}, r"run\.env\.A=B: must be a name of letters"),
        ({"run": {"name": "n", "env": {"A\nB": "x"}}}, r"must be a name of letters"),
        ({"run": {"name": "n", "mounts": ["src=/a"]}}, r"run\.mounts: must look like type=bind.*type must be"),
        ({"run": {"name": "n", "mounts": ["type=bind,src=/a\n,dst=/b"]}}, r"run\.mounts\.0: must be one line"),
        ({"run": {"name": "n", "replicates": 10**9}}, r"run\.replicates: .*1000"),
        (
            {"run": {"name": "n", "replicates": 3}, "ranker": {"training": {"seed": 2**31 - 2}}},
            r"seed 2147483646 \(ranker\) \+ run\.replicates=3: must stay below 2\^31",
        ),
        ({**MINIMAL, "encoder": {"training": {"learning_rate": "inf"}}}, r"learning_rate: .*finite number"),
        ({**MINIMAL, "encoder": {"quantizer": {"kind": "structured", "depth": 10**9}}}, r"depth: .*4096"),
        ({**MINIMAL, "ranker": {"holdout": {"validation_days": 10**14}}}, r"validation_days: .*36500"),
        (
            {**MINIMAL, "prepare": {"source": {"kind": "synthetic", "first_day": "9999-12-31"}}},
            r"first_day: .*less than 2900-01-01",
        ),
        (
            {**MINIMAL, "ranker": {"arms": {"none": {}, "baseline": {}}, "arm": "none"}},
            r"arms\.baseline: is the name of",
        ),
        ({**MINIMAL, "baseline": {"holdout": {"kind": "validation"}}}, r"baseline\.holdout: .* differs from the arms'"),
        ({"run": {"name": "n", "timeouts": {"commit_s": 0}}}, r"run\.timeouts\.commit_s: .*greater than 0"),
        (
            {"run": {"name": "n", "encoders": {"sid": "e"}, "replicates": 2}},
            r"run\.encoders: replicates would all have the same encoder; set run\.replicates=1",
        ),
        ({**MINIMAL, "ranker": {"sharding": {"types": []}}}, r"ranker\.sharding\.types: .*at least 1 item"),
        (
            {**MINIMAL, "encoder": {"training": {"holdout_share": 0}}},
            r"encoder\.training\.holdout_share: .*greater than 0",
        ),
        ({**MINIMAL, "encoder": {"training": {"seed": 2**31}}}, r"encoder\.training\.seed: .*2147483648"),
        ({**MINIMAL, "ranker": {"training": {"seed": -1}}}, r"ranker\.training\.seed: .*-1"),
        (
            {**MINIMAL, "ranker": {"training": {"batch_size": 100}}},
            r"ranker\.training\.batch_size=100: must be a multiple of lanes, 8",
        ),
        (
            {**MINIMAL, "ranker": {"training": {"eval_batch_size": 100}}},
            r"ranker\.training\.eval_batch_size=100: must be a multiple of lanes, 8",
        ),
        (
            {
                **MINIMAL,
                "encoders": {"text": {"training": {"lanes": 6}}},
                "run": {"name": "n", "launch": {"encoder": {"ranks": 4}}},
            },
            r"encoders\.text\.training\.lanes=6: must be a multiple of the number of ranks, 4",
        ),
        (
            {"run": {"name": "n", "launch": {"ranker": {"nodes": 3}}}},
            r"ranker\.training\.lanes=8: must be a multiple of the number of ranks, 6",
        ),
        ({**MINIMAL, "encoders": {"sid": {}}}, r"encoders\.sid: is what section encoder gives"),
        ({**MINIMAL, "encoders": {"Text": {}}}, r"encoders\.Text: must be of a-z"),
        ({**MINIMAL, "encoders": {"t": {"network": {"hiden": 1}}}}, r"encoders\.t\.network\.hiden: unknown key"),
        ({**MINIMAL, "materialize": {"prefix_lengths": {"t": [1]}}}, r"prefix_lengths\.t: SIDs are sid"),
        (
            {**MINIMAL, "ranker": {"arms": {"none": {"sids": ["t"]}}, "arm": "none"}},
            r"arms\.none\.sids: 't' is unknown",
        ),
        (
            {**MINIMAL, "ranker": {"arms": {"none": {"user": "hde"}}, "arm": "none"}},
            r"arms\.none: hde of users; sids=\['sid'\] are of others",
        ),
        (
            {
                **MINIMAL,
                "encoders": {"u": {"entity": "user"}},
                "ranker": {"arms": {"none": {"history": "side", "sids": ["u"]}}, "arm": "none"},
            },
            r"arms\.none: side of items; sids=\['u'\] are of others",
        ),
        (
            {**MINIMAL, "encoder": {"quantizer": {"kind": "rqvae"}}},
            r"prefix_lengths\.sid: \[5, 10, 15\] must rise within 1\.\.3, the digits of encoder\.quantizer \(rqvae\)",
        ),
        (at_a_url(privacy={"retention_days": 90}), r"retention_days: nothing would be deleted at s3://bucket/runs;"),
        (at_a_url(engine="spark"), r"engine: spark: its executors do not see s3://bucket/runs;"),
        (
            {**MINIMAL, "run": {"name": "x", "runs_dir": "s3:/bucket"}},
            r"run.runs_dir: 's3:/bucket': a URL has two slashes",
        ),
        (
            {**MINIMAL, "prepare": {"cache_dir": "s3://b/c"}},
            r"prepare.cache_dir: 's3://b/c': must be a path on this machine",
        ),
        ({**MINIMAL, "materialize": {"prefix_lengths": {"sid": [10, 5]}}}, r"sid: \[10, 5\] must rise within 1\.\.15"),
    ],
)
def test_error_names_key_value_and_rule(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(PipelineConfig, values, "c.yaml")


def test_mount_may_be_one_string_or_a_list_of_options() -> None:
    for mounts in (["type=bind,src=/a,dst=/b", "type=volume,src=v,dst=/c"], ["type=bind", "src=/a", "dst=/b"]):
        config = parse(PipelineConfig, {"run": {"name": "n", "mounts": mounts}}, "c.yaml")
        launch = Launch(mounts=config.run.mounts)
        (mount, *_) = app("x", ["true"], launch).roles[0].mounts
        assert (mount.src_path, mount.dst_path) == ("/a", "/b")


def test_checking_a_configuration_allocates_no_model_and_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    largest = {"kind": "residual_kmeans", "codes": 65536, "depth": 4096, "group_dim": 4096}
    parse(PipelineConfig, {**MINIMAL, "encoder": {"quantizer": largest}}, "c.yaml")  # 4 TiB of codewords
    assert torch.equal(torch.random.get_rng_state(), before)


def test_errors_of_several_sections_are_reported_together() -> None:
    values = {**MINIMAL, "encoder": {"no_such": 1}, "ranker": {"no_such": 2}}
    with pytest.raises(ConfigError) as caught:
        parse(PipelineConfig, values, "c.yaml")
    assert len(str(caught.value).splitlines()) == 2


def test_further_encoder_takes_unset_values_from_the_encoder_section() -> None:
    values = {
        **MINIMAL,
        "encoder": {"signals": {"text": 1.0, "brand": 0.1}, "training": {"epochs": 7, "seed": 3}},
        "encoders": {"text_sid": {"signals": {"text": 2.0}, "training": {"batch_size": 64}}},
    }
    config = parse(PipelineConfig, values, "c.yaml")
    assert config.sid_names == ("sid", "text_sid")
    own, text = config.encoder_of("sid"), config.encoder_of("text_sid", replicate=2)
    assert own == config.encoder
    assert text.signals == {"text": 2.0}
    assert (text.training.epochs, text.training.batch_size, text.training.seed) == (7, 64, 5)
    assert text.quantizer == own.quantizer


@pytest.mark.parametrize("name", ["complete_journey", "tables", "options", "quantizing_intent"])
def test_configurations_of_published_results_set_the_budget_explicitly(name: str) -> None:
    _, config = read_config(ROOT / f"configs/{name}.yaml", [])
    training = config.ranker.training
    epochs = 2 if name == "complete_journey" else 1
    assert (training.epochs, training.batch_size, training.warmup_steps) == (epochs, 1024, 50)
    sid = config.encoder_of("sid").training
    assert (sid.epochs, sid.batch_size) == (4, 256)
    if name == "complete_journey":
        assert (training.log_every, sid.log_every, config.tune.rungs) == (50, 100, (1.0,))
        assert config.ranker.arms["sid_ngram"].max_rows == 2**18


@pytest.mark.parametrize("kind", OWN)
def test_digits_of_every_quantizer_are_known_before_anything_runs(kind: str) -> None:
    """On torch's meta device, which has no values: boundaries that are found by a search must be on the host."""
    values = {**MINIMAL, "encoder": {"quantizer": {"kind": kind}}, "materialize": {"prefix_lengths": {"sid": [4097]}}}
    with pytest.raises(ConfigError, match=r"must rise within 1\.\.\d+, the digits of encoder\.quantizer"):
        parse(PipelineConfig, values, "run.yaml")
