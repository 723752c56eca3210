"""The fusion benchmark: its corpora and their split, losses, hidden signals, and reuse of trainings."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidestack.benchmarks.fusion import training as training_module
from sidestack.benchmarks.fusion.__main__ import main
from sidestack.benchmarks.fusion.corpus import arranged, distinct, paired, write_corpus
from sidestack.benchmarks.fusion.figures import draw_changes, draw_missing
from sidestack.benchmarks.fusion.measures import PAPER, paper_rows, plan, rows_of
from sidestack.benchmarks.fusion.missing import Case, cases, measure, measure_constant_guess, show_only, without_unseen
from sidestack.benchmarks.fusion.page import as_markdown
from sidestack.benchmarks.fusion.training import FUSION, METHODS, ONE_EACH, Trainer, Training
from sidestack.benchmarks.items import ALONE, read_items
from sidestack.encoder.config import EncoderConfig
from sidestack.encoder.evaluation import evaluate
from sidestack.encoder.fusion import VQFusion
from sidestack.encoder.holdout import held_out
from sidestack.encoder.signals import SignalBatch, SignalSpec
from sidestack.infra.checks import check_items
from sidestack.infra.commit import committing
from sidestack.infra.config import parse
from sidestack.infra.errors import ConfigError, StageError
from sidestack.infra.parquet import RowGroup
from sidestack.infra.snapshot import read_dataset
from sidestack.infra.store import Store, write_items
from sidestack.infra.tables import item_schema
from tests.pipelines.fabricated import SPEC as BARE_SPEC

SPEC = BARE_SPEC.model_copy(
    update={
        "embeddings": {"text_embedding": 8, "behaviour_embedding": 4},
        "categoricals": {"type": 5, "brand": 3},
        "num_items": 600,
    }
)
TWO = ("text_embedding", "behaviour_embedding")


def items(num: int = 600) -> pa.Table:
    """Return items with 200 texts; every third item has no behaviour embedding, every seventh no text."""
    rng = np.random.default_rng(0)
    text_N = rng.integers(0, 200, num)
    vectors = rng.standard_normal((200, 8)).astype(np.float16)
    behaviour_N4 = rng.standard_normal((num, 4)).astype(np.float16)
    return pa.table(
        [
            pa.array(np.arange(num)),
            pa.array([None if row % 7 == 0 else f"text {text}" for row, text in enumerate(text_N)]),
            pa.array(list(vectors[text_N]), pa.list_(pa.float16(), 8)),
            pa.array(
                [None if row % 3 == 0 else vector for row, vector in enumerate(behaviour_N4)],
                pa.list_(pa.float16(), 4),
            ),
            pa.array(text_N % 5, pa.int32()),
            pa.array(text_N % 3, pa.int32()),
        ],
        schema=item_schema(SPEC),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fusion") / "runs" / "some" / "prepare" / "key"
    with committing(path, ALONE, stage="prepare") as staging:
        write_items(Store(path.parent / "store"), staging, SPEC, "the items", item_schema(SPEC), [items()])
    return path


def read(corpus: Path) -> pa.Table:
    dataset = read_dataset(corpus)
    table = read_items(dataset, item_schema(dataset.spec).names)
    check_items(table, dataset.spec, RowGroup(corpus, 0, 0, len(table)))
    return table


@given(st.lists(st.integers(0, 60), min_size=1, max_size=400), st.sampled_from([0.05, 0.1, 0.3]))
def test_no_group_is_in_both_parts_of_the_encoders_split(groups: list[int], share: float) -> None:
    groups_N = np.array(groups)
    order = arranged(groups_N, share)
    assert len(set(order.tolist())) == len(order)
    held_M = held_out(np.arange(len(order)), share)
    assert not set(groups_N[order][held_M]) & set(groups_N[order][~held_M])


def test_split_drops_few_items() -> None:
    order = arranged(np.random.default_rng(1).integers(0, 2000, 5000), 0.1)
    assert len(order) > 4900


def test_paired_corpus_has_both_signals_in_every_item(dataset: Path, tmp_path: Path) -> None:
    table = read(write_corpus(tmp_path, dataset, paired, TWO, 0.1, None))
    assert 350 < len(table) <= 400
    assert table["behaviour_embedding"].null_count == 0
    held = held_out(table["item_id"].to_numpy(), 0.1)
    texts = np.array(table["text"].to_pylist(), object)
    assert held.any() and not (set(texts[held]) & set(texts[~held])) - {None}


def test_distinct_corpus_has_one_item_per_text_and_prefers_items_with_all_signals(
    dataset: Path, tmp_path: Path
) -> None:
    source, table = read(dataset), read(write_corpus(tmp_path, dataset, distinct, TWO, 0.1, None))
    texts = [text for text in table["text"].to_pylist() if text is not None]
    assert len(texts) == len(set(texts)) > 100
    full = {
        text
        for text, has in zip(
            source["text"].to_pylist(), source["behaviour_embedding"].is_valid().to_pylist(), strict=True
        )
        if has
    }
    kept = zip(table["text"].to_pylist(), table["behaviour_embedding"].is_valid().to_pylist(), strict=True)
    assert all(has for text, has in kept if text in full - {None})


def test_corpus_is_written_once_for_each_number_of_rows(dataset: Path, tmp_path: Path) -> None:
    first = write_corpus(tmp_path, dataset, paired, TWO, 0.1, 100)
    assert len(read(first)) <= 100
    assert write_corpus(tmp_path, dataset, paired, TWO, 0.1, 100) == first
    assert write_corpus(tmp_path, dataset, paired, TWO, 0.1, 90) != first


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_table_1_have_24_bits(method: str) -> None:
    spec = parse(EncoderConfig, {"quantizer": METHODS[method]}, method).quantizer.build().sid_spec("")
    assert 23.5 < spec.digits * math.log2(spec.radix) <= 24


def test_plan_has_an_encoder_for_each_signal_and_one_for_all_with_every_seed() -> None:
    made = plan(["dpca", "fsq"], {"a": 1.0, "b": 0.1}, 2, Path("corpus"))
    assert len(made) == 2 * 2 * 3
    assert {training.signals for training, setting in made.items() if setting == FUSION} == {(("a", 1.0), ("b", 0.1))}
    assert {training.signals for training, setting in made.items() if setting == ONE_EACH} == {
        (("a", 1.0),), (("b", 1.0),),
    }  # fmt: skip


def test_change_is_paired_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = plan(["dpca"], {"a": 1.0, "b": 0.1}, 2, Path("corpus"))
    losses = {(ONE_EACH, 0): 0.2, (ONE_EACH, 1): 0.4, (FUSION, 0): 0.22, (FUSION, 1): 0.48}
    outputs = {training: Path(f"{place}") for place, training in enumerate(settings)}
    summaries = {
        path: {
            "seconds": 3.0,
            "holdout": {"signals": {name: {"loss": losses[settings[made], made.seed]} for name, _ in made.signals}},
        }
        for made, path in outputs.items()
    }
    monkeypatch.setattr("sidestack.benchmarks.fusion.measures.read_summary", summaries.__getitem__)
    rows = {(row["setting"], row["signal"]): row for row in rows_of("two", settings, outputs)}
    fused = rows[FUSION, "a"]
    assert fused["loss"] == pytest.approx(0.35) and fused["losses"] == [0.22, 0.48]
    assert fused["change"] == pytest.approx((0.1 + 0.2) / 2)  # not .35 / .3 - 1
    assert fused["change_spread"] == pytest.approx(0.1 / math.sqrt(2))
    assert rows[ONE_EACH, "a"]["spread"] == pytest.approx(0.2 / math.sqrt(2)) and "change" not in rows[ONE_EACH, "a"]


def test_changes_computed_from_the_papers_losses_equal_those_in_the_paper() -> None:
    found = {(row["method"], row["signal"]): 100 * row["change"] for row in paper_rows() if "change" in row}
    printed = {"rq": (11.47, -5.67), "dpca": (4.01, 1.98), "fsq": (39.48, 15.11)}
    for method, (image, text) in printed.items():
        assert found[method, "image"] == pytest.approx(image, abs=0.04)
        assert found[method, "text"] == pytest.approx(text, abs=0.04)
    assert len(PAPER) == 6


SIGNALS = SignalSpec(
    embeddings={"text": 6}, categoricals={"type": 4, "brand": 3}, weights={"text": 1.0, "type": 0.1, "brand": 0.1}
)


def model() -> VQFusion:
    torch.manual_seed(0)
    network = {"embedding_width": 8, "categorical_width": 4, "hidden": 8}
    return VQFusion(parse(EncoderConfig, {"network": network}, "test"), SIGNALS).eval()


def batch(rows: int = 40) -> SignalBatch:
    generator = torch.Generator().manual_seed(1)
    present = {name: torch.rand(rows, generator=generator) < 0.8 for name in SIGNALS.names}
    return SignalBatch(
        {"text": torch.randn(rows, 6, generator=generator) * present["text"][:, None]},
        {
            name: torch.randint(number, (rows,), generator=generator) * present[name]
            for name, number in SIGNALS.categoricals.items()
        },
        present,
    )


def test_cases_are_all_signals_and_one_missing_and_one_only() -> None:
    assert [case.label for case in cases(["a", "b", "c"])] == [
        "all", "no a", "no b", "no c", "only a", "only b", "only c",
    ]  # fmt: skip
    assert {case.label: case.seen for case in cases(["a", "b"])}["no a"] == ("b",)


def test_losses_with_all_signals_equal_the_encoders_evaluation() -> None:
    fusion, rows = model(), batch()
    losses_K, right_K, items_K = measure(fusion, rows, Case("all", SIGNALS.names))
    expected = evaluate(fusion, rows, ALONE)["signals"]
    for place, name in enumerate(SIGNALS.names):
        assert losses_K[place] / items_K[place] == pytest.approx(expected[name]["loss"], rel=1e-5)
        if name != "text":
            assert right_K[place] / items_K[place] == pytest.approx(expected[name]["top1"], rel=1e-5)


def test_hidden_signal_is_not_encoded_but_its_loss_is_measured() -> None:
    fusion, rows = model(), batch()
    other = SignalBatch({"text": rows.embeddings["text"].flip(0)}, rows.categoricals, rows.present)
    case = Case("no text", ("type", "brand"))
    assert torch.equal(fusion.digits(show_only(rows, case.seen)), fusion.digits(show_only(other, case.seen)))
    losses_K, _, items_K = measure(fusion, rows, case)
    others_K, _, _ = measure(fusion, other, case)
    assert losses_K[0] != others_K[0] and torch.equal(losses_K[1:], others_K[1:])
    counted = rows.present["type"] | rows.present["brand"]
    assert items_K[0] == (rows.present["text"] & counted).sum()


def test_items_without_a_seen_signal_are_not_counted() -> None:
    fusion, rows = model(), batch()
    _, _, only_K = measure(fusion, rows, Case("only brand", ("brand",)))
    assert only_K[1] == (rows.present["type"] & rows.present["brand"]).sum()


def test_guess_is_measured_on_the_counted_items() -> None:
    fusion, rows, case = model(), batch(), Case("only brand", ("brand",))
    _, _, counted_K = measure(fusion, rows, case)
    _, _, judged_K = measure_constant_guess(fusion.signals, rows, without_unseen(rows, case))
    assert judged_K.tolist() == counted_K.tolist()


def test_one_guess_is_mean_direction_and_frequencies() -> None:
    spec = SignalSpec(embeddings={"text": 2}, categoricals={"type": 3}, weights={})
    here = torch.tensor([True, True, True, False])
    known = SignalBatch(
        {"text": torch.tensor([[9.0, 0], [0, 0.1], [0, 0], [7, 7]])}, {"type": torch.tensor([1, 1, 0, 2])},
        {"text": torch.tensor([True, True, False, False]), "type": here},
    )  # fmt: skip
    queried = SignalBatch(
        {"text": torch.tensor([[5.0, 0], [-1, -1]])}, {"type": torch.tensor([1, 2])},
        {"text": torch.tensor([True, True]), "type": torch.tensor([True, True])},
    )  # fmt: skip
    losses_K, right_K, items_K = measure_constant_guess(spec, known, queried)
    assert losses_K[0] == pytest.approx(1 - math.sqrt(0.5) + 2)  # texts have equal weights, whatever their norm
    assert losses_K[1] == pytest.approx(-math.log(3 / 6) - math.log(1 / 6))
    assert right_K.tolist() == [0, 1] and items_K.tolist() == [2, 2]


def fake_stage(calls: list[list[str]], code: int = 0) -> Callable[..., SimpleNamespace]:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        if not code:
            with committing(Path(command[command.index("--out") + 1]), ALONE, stage="encoder") as staging:
                (staging / "summary.json").write_text("{}")
        return SimpleNamespace(returncode=code, stderr="encoder: rank 0: error: the reason")

    return run


def test_training_with_the_same_settings_is_not_repeated(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", fake_stage(calls))
    made = [Training("dpca", (("text_embedding", 1.0),), seed, dataset) for seed in (0, 1, 1)]
    outputs = Trainer(tmp_path, 1, 0.1, []).all(made, jobs=2)
    assert len(calls) == 2 and len(set(outputs.values())) == 2
    assert Trainer(tmp_path, 1, 0.1, []).all(made, jobs=2) == outputs and len(calls) == 2
    Trainer(tmp_path, 2, 0.1, []).all(made[:1], jobs=1)
    Trainer(tmp_path, 1, 0.1, ["encoder.training.batch_size=64"]).all(made[:1], jobs=1)
    assert len(calls) == 4 and calls[3][calls[3].index("--set") + 1] == "encoder.training.batch_size=64"
    monkeypatch.setattr(training_module, "code_digest", lambda _: "other")
    Trainer(tmp_path, 1, 0.1, []).all(made[:1], jobs=1)
    assert len(calls) == 5


def test_failed_training_is_reported_with_its_reason(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_stage([], code=1))
    made = [Training("dpca", (("text_embedding", 1.0),), seed, dataset) for seed in range(4)]
    with pytest.raises(StageError, match="(?s)dpca of text_embedding, seed 0: .*the reason"):
        Trainer(tmp_path, 1, 0.1, []).all(made, jobs=2)
    with pytest.raises(ConfigError, match="epochs"):
        Trainer(tmp_path, 0, 0.1, []).all(made, jobs=2)


def fabricated_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for name in TWO:
            for setting, loss in ((ONE_EACH, 0.2), (FUSION, 0.25)):
                row = {"table": "two", "method": method, "setting": setting, "signal": name, "loss": loss}
                row |= {"spread": 0.001, "losses": [loss], "seconds": 1.0}
                rows.append(row | ({"change": 0.25, "change_spread": 0.02} if setting == FUSION else {}))
        for setting in (ONE_EACH, FUSION):
            row = {"table": "many", "method": method, "setting": setting, "signal": "brand", "loss": 0.5, "top1": 0.9}
            rows.append(row | {"spread": None, "losses": [0.5], "seconds": 1.0, "change": 1e4})
        for label, loss in (("all", 0.2), ("no brand", 0.9), ("one guess", 0.7)):
            row = {"table": "missing", "method": method, "case": label, "signal": "brand", "loss": loss}
            rows.append(row | {"top1": 0.5, "items": 10} | ({} if label == "one guess" else {"guess": 0.7}))
    return rows


def test_page_has_the_papers_values_and_marks_losses_above_the_guess() -> None:
    text = as_markdown(fabricated_rows(), {"paired": 1000, "distinct": 2000}, {"a.png": "a picture"})
    assert "| fusion DPCA | here | 0.2500 ±0.0010 | +25.0 % ±2.0 | 0.2500 ±0.0010 | +25.0 % ±2.0 |" in text
    assert "| fusion DPCA | paper | 0.1945 | +4.0 % | 0.2365 | +2.0 % |" in text
    assert "| fusion RQ | paper | 0.2224 | +11.5 % | 0.2892 | -5.7 % |" in text
    assert "| DPCA | brand | 0.5000 | 0.5000 | > 999 % | 90.0% | 90.0% |" in text
    assert "| no brand | 0.9 ! |" in text and "| all | 0.2 |" in text
    assert text.endswith("![a picture](a.png)\n")


def test_figures_are_drawn(tmp_path: Path) -> None:
    draw_changes(fabricated_rows(), tmp_path / "change.png")
    draw_missing(fabricated_rows(), "dpca", tmp_path / "missing.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("change", "missing"))


@pytest.mark.long
def test_quick_run_completes_and_a_second_run_reuses_its_trainings(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--dataset", f"{dataset}", "--cache", f"{tmp_path / 'cache'}", "--out", f"{tmp_path / 'out'}"]
    small = ["--set", "encoder.network.hidden=16", "--set", "encoder.training.batch_size=32"]
    main([*words, *small])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "fusion.json", "fusion.md", "fusion_change.png", "fusion_missing.png",
    }  # fmt: skip
    first = capfd.readouterr()
    assert "8 to be trained" in first.err and "4 signals in one SID" in first.out
    main([*words, *small])
    again = capfd.readouterr()
    assert "0 to be trained" in again.err and again.out == first.out
