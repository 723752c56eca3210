"""The example package of docs/extending: after installation its quantizer and source can be used in a run."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.quantizers import quantizers
from sidestack.infra.code import ROOT, code_digest, foreign_code
from sidestack.infra.config import digest, parse, plain
from sidestack.infra.errors import ConfigError, DataError
from sidestack.infra.kinds import models_in
from sidestack.infra.snapshot import read_dataset
from sidestack.pipelines import graph
from sidestack.pipelines.config import PipelineConfig
from sidestack.pipelines.graph import key, stages
from sidestack.pipelines.prepare.config import PrepareConfig
from sidestack.pipelines.prepare.sources import sources

EXAMPLE = ROOT / "docs/extending/example"
PACKAGE = "sidestack_example"
GROUPS = {"sidestack.quantizers": quantizers, "sidestack.sources": sources}
FIRST_DAY, DAYS, DIM = date(2024, 3, 1), 4, 8
ITEMS, ROWS = 300, 800


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the package on the path, with the entry points that an installation writes."""
    described = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{PACKAGE}-{described['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {described['name']}\nVersion: 1\n")
    lines = [
        line
        for group, entries in described["entry-points"].items()
        if group in GROUPS
        for line in (f"[{group}]", *(f"{name} = {place}" for name, place in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for folder in (tmp_path, EXAMPLE):
        monkeypatch.syspath_prepend(str(folder))
    for kinds in GROUPS.values():
        kinds.cache_clear()
    yield
    for kinds in GROUPS.values():
        kinds.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def click_file(path: Path, **changes: pa.Array) -> Path:
    """Write an unordered log of a few days in which clicks depend on the item's vector."""
    draw = np.random.default_rng(0)
    vectors_ID = draw.standard_normal((ITEMS, DIM)).astype(np.float32)
    item_N = np.concatenate([draw.permutation(ITEMS), draw.integers(0, ITEMS, ROWS - ITEMS)])
    second_N = draw.integers(0, DAYS * 86_400, ROWS)
    begin = datetime.combine(FIRST_DAY, datetime.min.time())
    columns: dict[str, Any] = {
        "time": pa.array([begin + timedelta(seconds=int(one)) for one in second_N], pa.timestamp("us")),
        "user": pa.array([f"u{one}" for one in draw.integers(0, 20, ROWS)]),
        "item": pa.array([f"i{one}" for one in item_N]),
        "vector": pa.array(list(vectors_ID[item_N])),
        "click": pa.array(vectors_ID[item_N, 0] + draw.standard_normal(ROWS) > 0.5).cast(pa.int8()),
    }
    pq.write_table(pa.table({**columns, **changes}), path)
    return path


def test_kinds_of_the_example_are_listed_after_ours_and_parsed_as_ours(installed: None) -> None:
    assert list(quantizers())[-1] == "sign_hash" and list(sources())[-1] == "click_file"
    config = parse(EncoderConfig, {"quantizer": {"kind": "sign_hash", "digits": 12}}, "encoder")
    assert plain(config)["quantizer"] == {"kind": "sign_hash", "digits": 12, "latent_dim": 32}
    assert parse(EncoderConfig, plain(config), "encoder") == config
    with pytest.raises(ConfigError, match="^encoder.quantizer.digit: unknown key; did you mean 'digits'"):
        parse(EncoderConfig, {"quantizer": {"kind": "sign_hash", "digit": 12}}, "encoder")
    with pytest.raises(ConfigError, match="^prepare.source.kind: is unknown; known are .*, click_file "):
        parse(PrepareConfig, {"source": {"kind": "click_files"}}, "prepare")


def test_code_of_the_example_is_foreign_code_of_its_kinds(installed: None) -> None:
    config = parse(EncoderConfig, {"quantizer": {"kind": "sign_hash"}}, "encoder")
    assert foreign_code(models_in(config)) == {PACKAGE: code_digest([PACKAGE], EXAMPLE)}
    assert foreign_code(models_in(EncoderConfig())) == {}


def test_code_of_the_example_is_in_the_keys_of_stages_that_run_it(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "prepare": {"source": {"kind": "click_file", "path": "log.parquet"}},
        "encoder": {"quantizer": {"kind": "sign_hash"}},
        "run": {"name": "own"},
    }
    plan = {one.label: one for one in stages(parse(PipelineConfig, values, "run.yaml"))}
    assert plan["materialize"].source() == digest({PACKAGE: code_digest([PACKAGE], EXAMPLE)})
    own = ("prepare", "encoder")
    before = [key(plan[label], {}) for label in (*own, "ranker-none")]
    monkeypatch.setattr(graph, "foreign_code", lambda kinds: {PACKAGE: "changed"} if foreign_code(kinds) else {})
    after = [key(plan[label], {}) for label in (*own, "ranker-none")]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


def test_quantizer_of_the_example_encodes_to_the_nearest_codeword(installed: None) -> None:
    config = module("quantizer").SignHashConfig(digits=4, latent_dim=6)
    quantizer = config.build()
    h_NH = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 3
    quantizer.start(h_NH, torch.Generator().manual_seed(1))
    torch.testing.assert_close(quantizer.normals_NH @ quantizer.normals_NH.T, torch.eye(4))
    digits_NN = quantizer.encode(h_NH)
    every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    nearest_N = torch.cdist(h_NH, quantizer.decode(every)).argmin(1)
    assert torch.equal(digits_NN, every[nearest_N])
    error, spread = ((h_NH - one).square().sum(1).mean() for one in (quantizer.decode(digits_NN), h_NH.mean(0)))
    assert error < 0.7 * spread  # 4 of 6 dimensions lose all but 2/pi of their variance


def test_histories_of_the_source_are_earlier_clicks_of_the_user(installed: None, tmp_path: Path) -> None:
    source = module("source")
    file = click_file(tmp_path / "log.parquet")
    rows = source.read_clicks(file, None)
    log = source.ClickLog(source.ClickFile(path=file, max_history=3), rows, "id")
    made = pa.concat_tables([part for _, parts in log.rows(log.days()) for part in parts])
    seen: dict[str, list[tuple[datetime, str]]] = {}
    items = sorted(set(rows["item"].to_pylist()))
    for raw, row in zip(rows.to_pylist(), made.to_pylist(), strict=True):
        before = [one for one in seen.get(raw["user"], []) if one[0] < raw["time"]]
        found = zip(row["history_times"], (items[one] for one in row["history_item_ids"]), strict=True)
        assert list(found) == before[-3:] and row["clicks_before"] == len(before)
        assert (row["event_time"], items[row["item_id"]], row["click"]) == (raw["time"], raw["item"], raw["click"])
        if raw["click"]:
            seen.setdefault(raw["user"], []).append((raw["time"], raw["item"]))
    assert max(made["clicks_before"].to_pylist()) > 3
    assert (log.spec.train, log.spec.test) == (
        (FIRST_DAY, FIRST_DAY + timedelta(days=DAYS - 2)),
        (FIRST_DAY + timedelta(days=DAYS - 1),) * 2,
    )
    assert len(source.read_clicks(file, FIRST_DAY + timedelta(days=1))) < len(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": pa.nulls(ROWS, pa.string())}, "column 'user': must not be null"),
        ({"vector": pa.array([[1.0], [1.0, 2.0]] * (ROWS // 2))}, "column 'vector': must hold lists of one length"),
        ({"click": pa.array(["no"] * ROWS)}, "must hold time, user, item, vector, click"),
    ],
)
def test_invalid_file_is_named(installed: None, tmp_path: Path, changes: dict[str, pa.Array], message: str) -> None:
    file = click_file(tmp_path / "log.parquet", **changes)
    with pytest.raises(DataError, match=f"log.parquet: {message}"):
        module("source").read_clicks(file, None)


CONFIG = """
prepare:
  source: {{kind: click_file, path: {log}}}
encoder:
  quantizer: {{kind: sign_hash, digits: 10, latent_dim: 12}}
  network: {{hidden: 32, embedding_width: 16}}
  training: {{epochs: 2, batch_size: 32, lanes: 2}}
materialize:
  prefix_lengths: {{sid: [4, 10]}}
"""


@pytest.mark.slow
def test_package_installed_by_pip_prepares_a_log_and_encodes_its_items(tmp_path: Path) -> None:
    target = tmp_path / "site"
    copy = shutil.copytree(EXAMPLE, tmp_path / "example", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-build-isolation")
    subprocess.run([*pip, "--no-deps", "--target", target, copy], check=True)
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(log=click_file(tmp_path / "log.parquet")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, target)))}

    def run(stage: str, out: str, *inputs: str) -> Path:
        given = [word for one in inputs for word in ("--input", one)]
        words: list[str | Path] = [sys.executable, "-m", stage, "--config", config, *given, "--out", tmp_path / out]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        return tmp_path / out

    dataset = run("sidestack.pipelines.prepare", "dataset")
    encoder = run("sidestack.encoder.train", "encoder", f"dataset={dataset}")
    made = read_dataset(run("sidestack.encoder.materialize", "sids", f"dataset={dataset}", f"encoder.sid={encoder}"))
    listed = made.snapshot.sids["sid"]
    assert (listed.spec["quantizer"], listed.spec["digits"]) == ("sign_hash", 10)
    sids = [
        sid
        for entry in made.partitions(listed.table("sid", "items"))
        for file in entry.files
        for sid in pq.read_table(made.store / entry.path / file.name)["sid"].to_pylist()
    ]
    assert len(sids) == ITEMS and all(0 <= sid < 2**10 for sid in sids) and len(set(sids)) > 50
