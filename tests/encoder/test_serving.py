"""The served encoder gives the SIDs of the tables, for one item or many, and refuses invalid requests."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
import torch

from sidestack.benchmarks.scoring_server import Program, ScoringServer, serving
from sidestack.encoder.bundle import EncoderBundle, load_bundle
from sidestack.encoder.encoding import BLOCK_ROWS, encode
from sidestack.encoder.export import MODEL_FOLDER, Reference, read_reference
from sidestack.encoder.serving import Item, ServedConfig, ServedEncoder, exact_rows, item_type, sid_is_text
from sidestack.encoder.sid.spec import SidSpec
from sidestack.encoder.sid_map import NULL
from sidestack.encoder.signals import SignalSpec, signal_batch
from sidestack.infra.errors import DataError
from sidestack.infra.manifest import verify
from sidestack.infra.mlflow_store import URI_VARIABLE
from sidestack.infra.served import load_served
from sidestack.infra.snapshot import read_dataset
from tests.encoder.fabricated import BARE_ITEMS, LOCAL, item_table, materialize_dataset, train_encoder
from tests.hostile import require_refusals

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(exported: Path) -> Any:
    return load_served(exported / MODEL_FOLDER)


def sids_of(answers: list[dict[str, Any]]) -> list[int | None]:
    return [answer["sid"] for answer in answers]


def test_served_sids_equal_those_of_the_tables(model: Any, reference: Reference) -> None:
    answers = model.predict(reference.items)
    assert sids_of(answers) == sids_of(reference.answers)
    assert [i for i, sid in enumerate(sids_of(answers)) if sid is None] == list(BARE_ITEMS)
    for answer in answers:
        digits = answer["digits"]
        assert answer["sid"] == (None if digits is None else int("".join(map(str, digits)), 3))


def test_requests_for_one_item_get_the_same_sids(model: Any, reference: Reference) -> None:
    chosen = [*range(0, len(reference.items), 7), *BARE_ITEMS]
    alone = [model.predict([reference.items[i]])[0]["sid"] for i in chosen]
    assert alone == [reference.answers[i]["sid"] for i in chosen]


@pytest.mark.parametrize("kept", [["text_embedding"], ["behaviour_embedding", "type"], ["brand"], []])
def test_any_signals_may_be_missing(model: Any, bundle: EncoderBundle, reference: Reference, kept: list[str]) -> None:
    """An absent key equals a null, and the SID is that of an item that lacks the signal in the tables."""
    table = item_table().slice(0, 60)
    for name in set(bundle.signals.names) - set(kept):
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type))
    ids_N = encode(bundle, reference.spec, signal_batch(table, bundle.signals))[:, 0]
    expected = [None if i == NULL else i for i in ids_N.tolist()]
    absent = [{name: item[name] for name in kept} for item in reference.items[:60]]
    null = [{name: item[name] if name in kept else None for name in item} for item in reference.items[:60]]
    assert sids_of(model.predict(absent)) == expected
    assert sids_of(model.predict(null)) == expected
    assert any(expected) == bool(kept)


def test_numbers_are_rounded_as_the_tables_store_them(model: Any, reference: Reference) -> None:
    """A text encoder returns float32; the tables store float16."""

    def finer(value: Any) -> Any:
        return [x * (1 + 2e-4) for x in value] if isinstance(value, list) else value

    items = [{name: finer(value) for name, value in item.items()} for item in reference.items[:200]]
    assert items != reference.items[:200]
    assert sids_of(model.predict(items)) == sids_of(reference.answers[:200])


def test_data_frames_with_numpy_values_are_accepted(model: Any, reference: Reference) -> None:
    frame = pa.Table.from_pylist([dict(item) for item in reference.items[:30]]).to_pandas()
    assert sids_of(model.predict(frame)) == sids_of(reference.answers[:30])


def wrong(**changes: Any) -> list[Item]:
    return [{"brand": 3}, {"text_embedding": [0.5] * 16, **changes}]


WRONG: list[tuple[list[Item], str]] = [
    (wrong(text_embeding=[0.5] * 16), r"inputs\[1\]: unknown signal 'text_embeding'; the model takes .*text_embedding"),
    (wrong(item_id=4), r"inputs\[1\]: unknown signal 'item_id'"),
    (wrong(text_embedding=[0.5] * 15), r"inputs\[1\].text_embedding: has 15 numbers, must have 16"),
    (wrong(text_embedding=[]), r"inputs\[1\].text_embedding: has 0 numbers, must have 16"),
    (wrong(text_embedding=0.5), r"inputs\[1\].text_embedding: must be a list of 16 numbers, is 0.5"),
    (wrong(text_embedding="0.5"), r"inputs\[1\].text_embedding: must be a list of 16 numbers, is '0.5'"),
    (wrong(text_embedding=[0.5] * 15 + ["1"]), r"text_embedding\[15\]: must be a number, is '1'"),
    (wrong(text_embedding=[None] + [0.5] * 15), r"text_embedding\[0\]: must be a number, is None"),
    (wrong(text_embedding=[[0.5]] * 16), r"text_embedding\[0\]: must be a number, is \[0.5\]"),
    (wrong(text_embedding=[0.5, [0.5]] * 8), r"text_embedding\[1\]: must be a number, is \[0.5\]"),
    (wrong(text_embedding=[0.5] * 15 + [float("nan")]), r"inputs\[1\].text_embedding\[15\]: nan is not finite"),
    (wrong(text_embedding=[float("-inf")] * 16), r"inputs\[1\].text_embedding\[0\]: -inf is not finite"),
    (
        wrong(text_embedding=[1e5] * 16),
        r"text_embedding\[0\]: 100000.0 is beyond float16, in which the tables store it",
    ),
    (wrong(text_embedding=[0.5] * 15 + [10**30]), r"text_embedding\[15\]: 10{30} is beyond float16"),
    (wrong(text_embedding=[0.5] * 15 + [10**400]), r"text_embedding\[15\]: 1000.*\.\.\..* is not finite"),
    (wrong(brand=10**400), r"inputs\[1\].brand: 1000.{0,40} is outside"),
    (wrong(text_embedding=[1e300] * 16), r"text_embedding\[0\]: 1e\+300 is beyond float16"),
    (wrong(brand=12), r"inputs\[1\].brand: 12 is outside \[0, 12\)"),
    (wrong(brand=-1), r"inputs\[1\].brand: -1 is outside \[0, 12\)"),
    (wrong(brand=2.5), r"inputs\[1\].brand: must be an integer, is 2.5"),
    (wrong(brand=float("inf")), r"inputs\[1\].brand: must be an integer, is inf"),
    (wrong(brand="3"), r"inputs\[1\].brand: must be an integer, is '3'"),
    (wrong(brand=True), r"inputs\[1\].brand: must be an integer, is True"),
    ([{}] * 1025, r"inputs: 1025 items, a request may hold 1024"),
]


@pytest.mark.parametrize(("items", "message"), WRONG, ids=[message for _, message in WRONG])
def test_invalid_input_is_a_bad_request_naming_item_signal_and_rule(
    model: Any, items: list[Item], message: str
) -> None:
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=message) as caught:
        model.predict(items)
    assert caught.value.get_http_status_code() == 400
    rule = str(caught.value)
    caught.value.message = f"Failed to predict data '{items}'. \nError: {rule}"  # as MLflow's server does
    assert json.loads(caught.value.serialize_as_json())["message"] == rule


def test_integral_doubles_are_accepted_and_an_empty_request_gets_no_answers(model: Any) -> None:
    assert model.predict([{"brand": 3.0}]) == model.predict([{"brand": 3}])
    assert model.predict([]) == []


def test_signature_lists_every_signal_as_optional_and_the_answer(model: Any) -> None:
    signature = model.metadata.signature.to_dict()
    (item,), (answer,) = json.loads(signature["inputs"]), json.loads(signature["outputs"])
    doubles = {"type": "array", "items": {"type": "double"}, "required": False}
    assert item["properties"] == {
        "text_embedding": doubles,
        "behaviour_embedding": doubles,
        "type": {"type": "long", "required": False},
        "brand": {"type": "long", "required": False},
    }
    assert answer["properties"] == {
        "sid": {"type": "long", "required": False},
        "digits": {"type": "array", "items": {"type": "long"}, "required": False},
    }


def test_long_sids_are_served_as_text_in_the_columns_of_the_tables(dataset: Path, tmp_path: Path) -> None:
    """Clients that read JSON numbers as doubles would round ids above 2^53."""
    quantizer = {"kind": "structured", "levels": 256, "groups": 1, "depth": 9, "group_dim": 6}
    train_encoder(LOCAL, dataset, tmp_path / "encoder", {"quantizer": quantizer, "training": {"epochs": 1}})
    shutil.copytree(dataset, tmp_path / "dataset")
    materialize_dataset(
        LOCAL, tmp_path / "dataset", tmp_path / "encoder", tmp_path / "sids", {"prefix_lengths": {"sid": [9]}}
    )
    long = load_bundle(tmp_path / "encoder", CPU)
    tables = read_reference(read_dataset(tmp_path / "sids"), long, 50)
    config = ServedConfig(signals=long.signals, spec=tables.spec, stored=tables.stored, max_items=50)  # type: ignore[arg-type]
    assert sid_is_text(tables.spec)
    for given, answer in zip(ServedEncoder(long, config).answers(tables.items), tables.answers, strict=True):
        ids = [answer["sid"], answer["sid_1"]]
        assert [given["sid"], given["sid_1"]] == [None if i is None else str(i) for i in ids]
        if given["digits"] is not None:
            assert [int.from_bytes(bytes(part)) for part in (given["digits"][:7], given["digits"][7:])] == ids


def test_exact_rows_is_the_smallest_batch_that_reproduces_a_whole_block(encoder: Path) -> None:
    bundle = load_bundle(encoder, CPU)
    network = bundle.model.encoder
    assert exact_rows(bundle) in (16, 64, BLOCK_ROWS)
    last_bit = network.register_forward_hook(lambda module, args, h_BH: h_BH * (1 + (len(h_BH) < 64) * 2e-7))
    assert exact_rows(bundle) in (64, BLOCK_ROWS)
    last_bit.remove()
    network.register_forward_hook(lambda module, args, h_BH: h_BH * (1 + (len(h_BH) < BLOCK_ROWS) * 2e-7))
    assert exact_rows(bundle) == BLOCK_ROWS


def test_signal_names_may_equal_method_names_but_unservable_names_are_refused() -> None:
    def signals(name: str) -> SignalSpec:
        return SignalSpec(embeddings={}, categoricals={name: 4}, weights={name: 1.0})

    for name in ("type", "copy", "json", "model_year", "a b"):
        item = item_type(signals(name))(**{name: 3})
        assert {**item.__dict__, **(item.model_extra or {})} == {name: 3}
    for name in ("_hidden", "model_config", "model_fields"):
        with pytest.raises(DataError, match=f"signal '{name}': cannot be served"):
            item_type(signals(name))


@pytest.mark.parametrize("digits_and_text", [(33, False), (34, True)])
def test_sids_are_text_when_a_double_cannot_hold_them(digits_and_text: tuple[int, bool]) -> None:
    digits, is_text = digits_and_text
    values = {"quantizer": "structured", "levels": 3, "digits": digits, "depth": digits, "groups": 1, "bound": "clamp"}
    spec = SidSpec.model_validate({**values, "fingerprint": "0" * 64})
    odd = int(spec.pack(torch.full((1, digits), 2))) - 1
    assert sid_is_text(spec) == is_text == (int(float(odd)) != odd)


def post(server: ScoringServer, items: Any) -> tuple[int, Any]:
    return server.post(json.dumps({"inputs": items}).encode())


@pytest.mark.whole
def test_stage_registers_a_model_that_mlflow_serves_by_its_alias(
    encoder: Path, materialized: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URI_VARIABLE, f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "run.yaml").write_text("{}")
    for out in ("first", "second"):
        command = [
            "--config",
            "run.yaml",
            "--input",
            f"encoder={encoder}",
            "--input",
            f"sids={materialized}",
            "--out",
            out,
        ]
        ran = subprocess.run(
            [sys.executable, "-m", "sidestack.encoder.export", *command],
            cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines() == [
        "export: registered as sidestack-encoder version 2; models:/sidestack-encoder@champion is it"
    ]
    verify(tmp_path / "second")
    for program in get_args(Program):
        with serving("models:/sidestack-encoder@champion", tmp_path / "server.log", program) as server:
            _check_answers(server, reference)
            _check_refusals(server)


def _check_answers(server: ScoringServer, reference: Reference) -> None:
    for items, expected in (
        (reference.items[:1], reference.answers[:1]),
        (reference.items[:256], reference.answers[:256]),
    ):
        status, body = post(server, items)
        assert status == 200
        assert sids_of(body["predictions"]) == sids_of(expected)
    assert post(server, [{}]) == (200, {"predictions": [{"sid": None, "digits": None}]})


def _check_refusals(server: ScoringServer) -> None:
    for items, message in WRONG:
        status, body = post(server, items)
        assert status == 400
        assert re.search(message, body["message"])
        assert "Failed to predict" not in body["message"]
    for body in (b"{", b"[]", b'{"input": []}', b'{"inputs": 3}', b'{"inputs": [3]}'):
        status, answer = server.post(body)
        assert status == 400, answer
    assert post(server, [{"brand": 3}])[0] == 200  # the server still answers


@pytest.mark.slow
def test_hostile_requests_are_refused_in_bounded_memory(exported: Path, tmp_path: Path) -> None:
    with serving(exported / MODEL_FOLDER, tmp_path / "server.log") as server:
        require_refusals(
            server,
            json.dumps({"inputs": [{"brand": 3}]}).encode(),
            {
                b'{"inputs": [{"text_embedding": [' + b"[" * 10**5: "body: lists and objects lie too deep",
                b'{"inputs": [{"brand": ' + b"1" * 5_000 + b"}]}": "body: an integer has more than 4,300 digits",
                b'{"inputs": [{"brand": ' + b"1" * 4_000 + b"}]}": "inputs[0].brand: 1111",
                b'{"inputs": [{"brand": NaN}]}': "inputs[0].brand: must be an integer, is nan",
                b'{"inputs": [{"brand": 1e400}]}': "inputs[0].brand: must be an integer, is inf",
                b'{"inputs": [{"' + b"b" * 10**6 + b'": 1}]}': "inputs[0]: unknown signal 'bbb",
                b'{"inputs": [' + b"[]," * 10**6 + b"1]}": "inputs: 1000001 items, a request may hold 1024",
                b'{"inputs": ["' + b"b" * 10**7 + b'"]}': "inputs[0]: must be an object, is 'bbb",
            },
        )
