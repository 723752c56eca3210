"""A served ranker: parity with training, new items, unknown ids, refused requests, and servers over HTTP."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from uvicorn.config import STARTUP_FAILURE

from sidestack.benchmarks import ranking
from sidestack.benchmarks.scoring_server import Program, ScoringServer, serving
from sidestack.infra.code import ROOT
from sidestack.infra.errors import DataError
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.served import load_served
from sidestack.ranker.features import ITEM_IDS
from sidestack.ranker.serving.config import SERVED_FILE
from sidestack.ranker.serving.model import RawLookup, ServedRanker
from sidestack.ranker.serving.tables import ServedTable
from tests.encoder.fabricated import SPEC, item_table
from tests.hostile import require_refusals
from tests.ranker.exporting import ARMS, TrainedArms, planted, request_of


@pytest.fixture(scope="module")
def served(versions: dict[str, Path]) -> ServedRanker:
    return ServedRanker(versions["side"])


@pytest.mark.parametrize("arm", ARMS)
def test_version_answers_with_the_predictions_of_the_ranker(versions: dict[str, Path], arm: str) -> None:
    summary = json.loads((versions[arm].parents[2] / "summary.json").read_text())
    assert summary["largest_difference"] <= 1e-5  # on 150 held-out rows; a larger one is not committed
    answer = ServedRanker(versions[arm]).answer(request_of(), "request")
    assert answer["unknown"] == {}
    for p_N in answer["probabilities"].values():
        assert len(p_N) == 2 and all(0 < p < 1 for p in p_N)


def test_score_of_a_candidate_does_not_depend_on_the_others(served: ServedRanker) -> None:
    two = served.answer(request_of(), "r")["probabilities"]["click"]
    turned = served.answer(request_of(candidates=request_of()["candidates"][::-1]), "r")["probabilities"]["click"]
    alone = [
        served.answer(request_of(candidates=[one]), "r")["probabilities"]["click"][0]
        for one in request_of()["candidates"]
    ]
    np.testing.assert_allclose(two, turned[::-1], atol=1e-6)
    np.testing.assert_allclose(two, alone, atol=1e-6)


def new_item(like: int) -> dict[str, Any]:
    """Return a candidate that is not in the tables, with the signals of item `like`."""
    (row,) = item_table().slice(like, 1).to_pylist()
    signals = {name: row[name] for name in (*SPEC.embeddings, *SPEC.categoricals) if row[name] is not None}
    signals = {name: list(map(float, value)) if isinstance(value, list) else value for name, value in signals.items()}
    return {"price": 0.5, "slot": [1], "signals": signals}


@pytest.mark.parametrize("arm", ["side", "sid_ngram", "hde"])
def test_new_items_are_ranked_by_their_content(versions: dict[str, Path], arm: str) -> None:
    served = ServedRanker(versions[arm])
    likes = [0, 5, 40, 333]
    unknown = [{"price": 0.5, "slot": [1]}]
    answer = served.answer(request_of(candidates=[*map(new_item, likes), *unknown]), "r")
    assert answer["unknown"] == {"items": 5}
    *p_new, p_nothing = answer["probabilities"]["click"]
    assert len({*p_new, p_nothing}) > 3  # items differ by their content, unlike in a table of ids
    # The SID of a new item is the published one of the item with its signals; it lacks only the row of the id.
    known = served.answer(request_of(candidates=[{"item_id": like, "price": 0.5, "slot": [1]} for like in likes]), "r")
    sids = [served._sids["sid"].of(np.array([like]))[0, 0] for like in likes]
    encoded = served._sids["sid"].encoded([new_item(like)["signals"] for like in likes], ["a"] * len(likes))[:, 0]
    assert encoded.tolist() == sids
    assert not np.allclose(known["probabilities"]["click"], p_new)


def new_dense_item(like: int) -> dict[str, Any]:
    """Return `new_item` with only its embeddings, which an arm of raw embeddings takes."""
    item = new_item(like)
    return {**item, "signals": {name: value for name, value in item["signals"].items() if name in SPEC.embeddings}}


def test_new_item_of_a_dense_arm_scores_as_the_item_with_its_embeddings(versions: dict[str, Path]) -> None:
    served = ServedRanker(versions["dense"])
    likes = [0, 5, 40, 333]
    answer = served.answer(request_of(candidates=[*map(new_dense_item, likes), {"price": 0.5, "slot": [1]}]), "r")
    assert answer["unknown"] == {"items": 5}
    assert len(set(answer["probabilities"]["click"])) > 3  # items differ by their content
    # With the rows of item ids set to zero, items with an id differ only by their content, as new ones do.
    for feature in served.features.bags:
        if feature.column == ITEM_IDS:
            served._network._tables[feature.table] = ServedTable({"rows": torch.zeros(feature.rows, 8)})  # type: ignore[index]
    by_id = request_of(candidates=[{"item_id": like, "price": 0.5, "slot": [1]} for like in likes])
    by_signals = request_of(candidates=[*map(new_dense_item, likes)])
    assert served.answer(by_id, "r")["probabilities"] == served.answer(by_signals, "r")["probabilities"]
    kept = request_of(candidates=[{**new_dense_item(9), "item_id": like} for like in likes])
    assert served.answer(kept, "r")["probabilities"] == served.answer(by_id, "r")["probabilities"]


@pytest.mark.parametrize(
    ("signals", "rule"),
    [
        (
            {"brand": 1},
            "r.candidates[0].signals: unknown field 'brand'; it may have behaviour_embedding, text_embedding",
        ),
        ({"text_embedding": [1.0]}, "r.candidates[0].signals.text_embedding: has 1 numbers, must have 16"),
        ({"text_embedding": [math.nan] * 16}, "r.candidates[0].signals.text_embedding[0]: nan is not finite"),
    ],
)
def test_a_wrong_embedding_of_a_new_item_is_refused(
    versions: dict[str, Path], signals: dict[str, Any], rule: str
) -> None:
    with pytest.raises(DataError) as caught:
        ServedRanker(versions["dense"]).answer(with_signals(signals), "r")
    assert str(caught.value).startswith(rule)


def test_embedding_that_overflows_float16_when_scaled_is_refused() -> None:
    lookup = RawLookup({"a": 2, "b": 1}, {"a": 4.0, "b": 1.0}, torch.zeros(1, dtype=torch.bool))
    assert lookup.embeddings([{"a": [1, 2]}], ["r"]).tolist() == [[4.0, 8.0, 0.0]]
    with pytest.raises(DataError, match=r"r\.a\[1\]: is beyond float16 when it is scaled by 4"):
        lookup.embeddings([{"a": [1, 2e4]}], ["r"])


def test_served_description_has_the_stored_precision_of_the_signals(versions: dict[str, Path]) -> None:
    described = json.loads((versions["side"] / SERVED_FILE).read_text())
    assert described["sids"]["sid"]["stored"] == {"text_embedding": "float16", "behaviour_embedding": "float16"}


def test_new_items_get_equal_scores_in_an_arm_without_content(versions: dict[str, Path]) -> None:
    answer = ServedRanker(versions["none"]).answer(request_of(candidates=[{"price": 0.5}, {"price": 0.5}]), "r")
    assert len(set(answer["probabilities"]["click"])) == 1


def test_unknown_ids_are_counted(served: ServedRanker) -> None:
    history = {"item_ids": [1, 10**6, 2**70], "times": [1.0, 2.0, 3.0]}
    candidates = [{"item_id": 700, "price": 1, "slot": [1, 77]}, {"item_id": 3, "price": 2}]
    answer = served.answer(request_of(user={"user_id": 40}, history=history, candidates=candidates), "r")
    assert answer["unknown"] == {"user": 1, "items": 1, "history": 2, "slot": 1}
    assert served.answer(request_of(user=..., history=...), "r")["unknown"] == {"user": 1}


def test_unknown_history_entries_score_equally_and_differ_from_known_ones(
    served: ServedRanker,
) -> None:
    def click(ids: list[int]) -> list[float]:
        history = {"item_ids": ids, "times": [float(n) for n in range(len(ids))]}
        return served.answer(request_of(history=history), "r")["probabilities"]["click"]

    assert click([10**6]) == click([10**9])
    assert click([10**6]) != click([699])


def with_signals(signals: dict[str, Any]) -> dict[str, Any]:
    return request_of(candidates=[{"price": 1, "signals": signals}])


def with_history(ids: list[Any], times: list[Any]) -> dict[str, Any]:
    return request_of(history={"item_ids": ids, "times": times})


FAULTS = [
    ([], "r: must be an object, is []"),
    (request_of(candidates=[]), "r.candidates: has 0 entries, must have 1 to 1000"),
    (request_of(candidates=[{"price": 1.0}] * 1001), "r.candidates: has 1001 entries, must have 1 to 1000"),
    (request_of(candidates={}), "r.candidates: must be a list of objects, is {}"),
    (request_of(candidates=[5]), "r.candidates[0]: must be an object, is 5"),
    (request_of(more=1), "r: unknown field 'more'; it may have candidates, history, time, user"),
    (request_of(candidates=[{"item_id": 1}]), "r.candidates[0].price: is missing"),
    (request_of(candidates=[{"item_id": 1, "price": math.nan}]), "r.candidates[0].price: nan is not finite in float32"),
    (request_of(candidates=[{"item_id": 1, "price": 1e400}]), "r.candidates[0].price: inf is not finite in float32"),
    (request_of(candidates=[{"item_id": 1, "price": 1e39}]), "r.candidates[0].price: 1e+39 is not finite in float32"),
    (request_of(candidates=[{"item_id": 1, "price": 10**400}]), "r.candidates[0].price: 1000"),
    (request_of(candidates=[{"item_id": 1, "price": "1"}]), "r.candidates[0].price: must be a number, is '1'"),
    (request_of(candidates=[{"item_id": -1, "price": 1}]), "r.candidates[0].item_id: -1 is negative"),
    (request_of(candidates=[{"item_id": True, "price": 1}]), "r.candidates[0].item_id: must be an integer, is True"),
    (request_of(candidates=[{"item_id": 1.5, "price": 1}]), "r.candidates[0].item_id: must be an integer, is 1.5"),
    (request_of(candidates=[{"item_id": math.inf}]), "r.candidates[0].item_id: must be an integer, is inf"),
    (request_of(candidates=[{"price": 1, "slot": [-1]}]), "r.candidates[0].slot[0]: -1 is negative"),
    (with_signals({"colour": 1}), "r.candidates[0].signals: unknown field 'colour'"),
    (with_signals({"brand": 12}), "r.candidates[0].signals.brand: 12 is outside [0, 12)"),
    (with_signals({"text_embedding": [1.0]}), "r.candidates[0].signals.text_embedding: has 1 numbers, must have 16"),
    (request_of(user={"user_id": "a"}), "r.user.user_id: must be an integer, is 'a'"),
    (with_history([1], []), "r.history: has 1 item_ids and 0 times"),
    (with_history([1], ["soon"]), "r.history.times[0]: 'soon' is not an ISO 8601 time"),
    (with_history([1], [None]), "r.history.times[0]: must be an ISO 8601 text, is None"),
    (with_history([1, 1], [1, 1e300]), "r.history.times[1]: 1e+300: must be seconds since 1970"),
    (with_history([1], ["2024-02-01"]), "r.history.times[0]: 2024-02-01 is after the request's time"),
    (with_history([1, 2], [9.0, 8.0]), "r.history.times[1]: 8.0 is before the entry before it"),
    (with_history([1] * 10_001, [1.0] * 10_001), "r.history: has 10001 entries, may have 10000"),
    (request_of(time="yesterday"), "r.time: 'yesterday' is not an ISO 8601 time"),
    (request_of(time=math.nan), "r.time: nan: must be seconds since 1970"),
    (request_of(time=True), "r.time: must be an ISO 8601 text, is True"),
    (request_of(time=[[[[]]]]), "r.time: must be an ISO 8601 text"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "rule"), FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_invalid_request_is_refused_naming_field_and_rule(served: ServedRanker, request_: Any, rule: str) -> None:
    with pytest.raises(DataError) as caught:
        served.answer(request_, "r")
    assert str(caught.value).startswith(rule)
    assert len(str(caught.value)) < 200


def test_invalid_request_raises_an_error_of_status_400(versions: dict[str, Path]) -> None:
    model = load_served(versions["side"].parents[1])
    with pytest.raises(Exception, match=r"inputs\[1\].candidates: has 0 entries") as caught:
        model.predict([request_of(), request_of(candidates=[])])
    assert caught.value.get_http_status_code() == 400  # type: ignore[attr-defined]


def test_request_with_many_candidates_is_answered(served: ServedRanker) -> None:
    many: list[Mapping[str, Any]] = [{"item_id": n, "price": n / 7} for n in range(500)]
    answer = served.answer(request_of(candidates=many), "r")
    assert len(answer["probabilities"]["conversion"]) == 500


@pytest.mark.whole
def test_commands_of_the_readme_score_export_and_serve(arms: TrainedArms, tmp_path: Path) -> None:
    """Run `ranker.score`, `ranker.export` and `mlflow models serve` as in the README and docs/serving.md."""
    store = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), URI_VARIABLE: store}

    def run(module: str, *words: str) -> str:
        inputs = ["--model", str(arms.rankers["side"]), "--dataset", str(arms.dataset)]
        line = [sys.executable, "-m", module, *inputs, *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "score: 400 rows, 0 of them scored before" in run("sidestack.ranker.score", "--out", "scored")
    scored = pq.read_table(tmp_path / "scored/predictions").sort_by("row")
    trained = pq.read_table(arms.rankers["side"] / "predictions").sort_by("row")
    np.testing.assert_allclose(scored["p_click"].to_numpy()[200:], trained["p_click"], atol=1e-6)
    words = ("--input", f"encoder.sid={arms.encoder}", "--set", "ranker_export.checked_rows=150", "--out", "exported")
    printed = run("sidestack.ranker.export", *words)
    assert "models:/sidestack-ranker@challenger is it" in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(URI_VARIABLE, store)
        for program in get_args(Program):
            with serving("models:/sidestack-ranker@challenger", tmp_path / "server.log", program) as server:
                _check_answers(server)


def _check_answers(server: ScoringServer) -> None:
    status, body = server.post(json.dumps({"inputs": [request_of()]}).encode())
    assert status == 200 and body["predictions"][0]["unknown"] == {}
    for wrong, rule in ((request_of(candidates=[]), "has 0 entries"), ({"candidates": [{}]}, "price: is missing")):
        status, body = server.post(json.dumps({"inputs": [wrong]}).encode())
        assert status == 400 and body["message"].startswith("inputs[0].") and rule in body["message"]
    assert server.post(b'{"inputs": [{"candidates": [{"price": 1e400}]}]}')[0] == 400
    status, _ = server.post(json.dumps({"inputs": [request_of()]}).encode())
    assert status == 200  # the server still answers


def body_of(request: Any) -> bytes:
    return json.dumps({"inputs": [request]}).encode()


@pytest.mark.slow
def test_invalid_requests_get_400_over_http_and_the_server_still_answers(
    versions: dict[str, Path], tmp_path: Path
) -> None:
    refused = {body_of(request): f"inputs[0]{rule.removeprefix('r')}" for request, rule in FAULTS}
    of_price = b'{"inputs": [{"candidates": [{"price": %s}]}]}'
    refused |= {
        body_of(request_of(candidates=[{"price": 1.0}] * 10_000)): "inputs[0].candidates: has 10000 entries, must have",
        of_price % (b"[" * 10**5): "body: lists and objects lie too deep within each other",
        of_price % (b"[" * 900 + b"]" * 900): "inputs[0].candidates[0].price: must be a number, is [[[",
        of_price % (b"1" * 5_000): "body: an integer has more than 4,300 digits",
        of_price % (b"1" * 4_000): "inputs[0].candidates[0].price: 1111",
        of_price % b"NaN": "inputs[0].candidates[0].price: nan is not finite in float32",
        of_price % b"1e400": "inputs[0].candidates[0].price: inf is not finite in float32",
        of_price % (b'"' + b"b" * 10**7 + b'"'): "inputs[0].candidates[0].price: must be a number, is 'bbb",
        b'{"inputs": [' + b"[]," * 10**6 + b"1]}": "inputs[0]: must be an object, is []",
        body_of(request_of(time="2024-01-03T00:00:00Z")): "inputs[0].history.times[2]: ",
        body_of({"candidates": [{"price": 1, "slot": [1] * 100_001}]}): "inputs[0].candidates: the lists of ids hold",
    }
    with serving(versions["side"].parents[1], tmp_path / "server.log") as server:
        require_refusals(server, body_of(request_of()), refused)
        status, body = server.post(body_of(request_of(candidates=[{"item_id": 2**70, "price": 1.0}])))
        assert status == 200 and body["predictions"][0]["unknown"] == {"items": 1}  # a huge id is counted as unknown


@pytest.mark.slow
def test_server_of_an_altered_model_exits_with_the_error(versions: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(versions["side"].parents[1], tmp_path / "model")
    planted(model / "artifacts" / "version")
    command = [sys.executable, "-m", "sidestack.infra.serve", "--model", str(model), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == STARTUP_FAILURE
    assert "network.pkl: missing, altered, or not of this version" in done.stderr


@pytest.mark.slow
def test_a_model_that_version_0_2_0_exported_is_served(versions: dict[str, Path], tmp_path: Path) -> None:
    """Its packages are not inside `sidestack`, and its description names the loader accordingly."""
    model = Path(shutil.copytree(versions["side"].parents[1], tmp_path / "model"))
    carried = model / "code/sidestack"
    for package in ("encoder", "infra", "ranker"):
        (carried / package).rename(model / "code" / package)
    shutil.rmtree(carried)
    for file in (*model.rglob("*.py"), model / "MLmodel"):
        text = re.sub(r"\bsidestack\.(?=(?:encoder|infra|ranker)\b)", "", file.read_text())
        file.write_text(re.sub(r"^import sidestack\n", "", text, flags=re.M))
    with serving(model, tmp_path / "server.log") as server:
        _check_answers(server)


@pytest.mark.long
def test_benchmark_of_a_served_ranker_completes(versions: dict[str, Path], tmp_path: Path) -> None:
    model = versions["side"].parents[2]
    ranking.main(["--model", str(model), "--requests", "3", "--clients", "2", "--seconds", "1", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "ranking.json").read_text())["rows"]
    assert [row["where"] for row in rows if "errors" in row] == [
        f"{name}: 2 clients for 1 s" for name in get_args(Program)
    ]
    assert all(row["errors"] == 0 for row in rows if "errors" in row)
    assert "| in process |" in (tmp_path / "ranking.md").read_text()
