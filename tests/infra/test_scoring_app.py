"""The server of exported models over HTTP: its limits, refused requests, and that it keeps running after errors."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml

from sidestack.infra import scoring_app, serve
from sidestack.infra.errors import DataError
from sidestack.infra.scoring_app import Answers, ServeConfig, load_answers, read_inputs

JSON = {"Content-Type": "application/json"}
MAX_BODY_BYTES = 100_000


def doubled(inputs: list[Any]) -> list[Any]:
    """Answer as a model that doubles numbers."""
    for place, value in enumerate(inputs):
        if not isinstance(value, int | float):
            raise DataError(f"inputs[{place}]: must be a number")
    return [2 * value for value in inputs]


@contextmanager
def running(answers: Answers, **bounds: int) -> Iterator[int]:
    """Serve a model in a thread and yield its port."""
    config = ServeConfig(model=Path(), **{"max_body_bytes": MAX_BODY_BYTES, **bounds})
    app = scoring_app.scoring_app(answers, config)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(doubled) as port:
        yield port


def answered(response: HTTPResponse) -> tuple[int, Any]:
    return response.status, json.loads(response.read())


def post(port: int, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/invocations", body, JSON if headers is None else headers)
    try:
        return answered(connection.getresponse())
    finally:
        connection.close()


def test_request_is_answered_in_mlflows_format(port: int) -> None:
    assert post(port, b'{"inputs": [1, 2.5]}') == (200, {"predictions": [2, 5.0]})
    typed = {"Content-Type": "application/json; charset=UTF-8"}
    assert post(port, b'{"inputs": []}', typed) == (200, {"predictions": []})


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_health_check_succeeds_with_a_loaded_model(port: int, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"\n")
    connection.close()


def head(body_bytes: int) -> bytes:
    """Return the head of a request whose body does not follow."""
    fields = [
        "POST /invocations HTTP/1.1",
        "Host: a",
        "Content-Type: application/json",
        f"Content-Length: {body_bytes}",
    ]
    return "\r\n".join([*fields, "", ""]).encode()


REFUSED = [
    (b"[" * 90_000, 400, "body: lists and objects lie too deep within each other"),
    (b'{"inputs": ' + b'[{"a": ' * 10_000, 400, "body: lists and objects lie too deep within each other"),
    (b'{"inputs": [' + b"1" * 5_000 + b"]}", 400, "body: an integer has more than 4,300 digits"),
    (b'{"inputs": [' + b"1," * 40_000, 400, "body: is not JSON: Expecting value: line 1 column 80013 (char 80012)"),
    (b"", 400, "body: is not JSON: Expecting value: line 1 column 1 (char 0)"),
    (b'{"inputs": ["\xff"]}', 400, "body: is not UTF-8 at byte 13"),
    (b'{"inputs": ["a"]}', 400, "inputs[0]: must be a number"),
    *(
        (body, 400, 'body: must be an object with one field, {"inputs": [...]}')
        for body in (b"[]", b"3", b"{}", b'{"inputs": 3}', b'{"inputs": [], "params": {}}', b'{"instances": []}')
    ),
    (b'{"inputs": [' + b"1," * MAX_BODY_BYTES + b"1]}", 413, "body: is longer than 100,000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "rule"), REFUSED, ids=[f"{s}-{rule[:40]}" for _, s, rule in REFUSED])
def test_invalid_request_is_refused_by_its_rule_and_the_server_keeps_running(
    port: int, body: bytes, status: int, rule: str
) -> None:
    found, answer = post(port, body)
    assert (found, answer["message"]) == (status, rule)
    assert post(port, b'{"inputs": [3]}') == (200, {"predictions": [6]})


@pytest.mark.parametrize(
    ("headers", "rule"),
    [
        ({"Content-Type": "text/csv"}, "Content-Type: must be application/json, is 'text/csv'"),
        ({}, "Content-Type: must be application/json, is ''"),
        ({"Content-Type": "x" * 9_000}, f"Content-Type: must be application/json, is '{'x' * 80}'"),
        (
            {"Content-Type": "application/json; charset=latin-1"},
            "Content-Type: may have charset=utf-8 alone, has 'charset=latin-1'",
        ),
    ],
)
def test_other_content_type_is_refused(port: int, headers: dict[str, str], rule: str) -> None:
    status, answer = post(port, b'{"inputs": [3]}', headers)
    assert (status, answer["message"]) == (415, rule)


def test_chunked_body_is_read_only_up_to_the_bound(port: int) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1_000):
            sent += 10_000
            yield b" " * 10_000

    status, answer = post(port, parts())  # sent in chunks
    assert (status, answer["message"]) == (413, "body: is longer than 100,000 bytes")
    assert sent == 10_000_000  # the client sends everything before it reads the answer


def test_long_body_is_refused_before_it_is_sent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        head = (
            "POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100000000\r\n"
        )
        client.sendall(f"{head}\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 413 ")


def test_client_that_does_not_send_its_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_app, "READ_SECONDS", 0.2)
    with running(doubled, max_concurrent=1) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(head(body_bytes=10))
            assert client.recv(100).startswith(b"HTTP/1.1 408 ")
        assert post(port, b'{"inputs": [3]}')[0] == 200


def test_client_that_disconnects_frees_its_slot() -> None:
    with running(doubled, max_concurrent=1) as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
                head = (
                    "POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 10\r\n"
                )
                client.sendall(f"{head}\r\n".encode())
        for _ in range(100):
            if post(port, b'{"inputs": [3]}')[0] == 200:
                return
            time.sleep(0.05)
        raise AssertionError("the slot was never freed")


def test_requests_beyond_the_limit_get_503_and_running_ones_complete() -> None:
    """Two slots and six concurrent clients; the model answers only after the other four were refused."""
    resume = threading.Event()

    def waiting(inputs: list[Any]) -> list[Any]:
        assert resume.wait(60)
        return inputs

    statuses: list[int] = []
    rules: set[str] = set()
    retry: set[str | None] = set()

    def ask(port: int) -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/invocations", b'{"inputs": [1]}', JSON)
        response = connection.getresponse()
        status, answer = answered(response)
        if status == 503:
            rules.add(answer["message"])
            retry.add(response.getheader("Retry-After"))
        statuses.append(status)
        connection.close()
        if statuses.count(503) == 4:
            resume.set()

    with running(waiting, max_concurrent=2) as port:
        clients = [threading.Thread(target=ask, args=(port,)) for _ in range(6)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(90)
        assert sorted(statuses) == [200, 200, 503, 503, 503, 503]
        assert rules == {"2 requests are under way, the most that are taken at once"}
        assert retry == {"1"}
        assert post(port, b'{"inputs": [1]}') == (200, {"predictions": [1]})


def test_error_of_the_model_gives_500_and_the_server_keeps_running() -> None:
    def wrong(inputs: list[Any]) -> list[Any]:
        return [1 / value for value in inputs]

    with running(wrong, max_concurrent=1) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/invocations", b'{"inputs": [0]}', JSON)
        response = connection.getresponse()
        assert (response.status, response.read()) == (500, b"Internal Server Error")
        connection.close()
        assert post(port, b'{"inputs": [2]}') == (200, {"predictions": [0.5]})


def test_json_numbers_are_read_without_rounding() -> None:
    (nan, beyond, exact) = read_inputs(b'{"inputs": [NaN, 1e400, 9007199254740993]}')
    assert nan != nan and beyond == float("inf") and exact == 2**53 + 1


@pytest.mark.parametrize("described", [None, "a: [", "{}", "metadata: {answers: 'a:b'}\n", "metadata:\n"])
def test_folder_without_a_model_is_refused(tmp_path: Path, described: str | None) -> None:
    if described is not None:
        (tmp_path / "MLmodel").write_text(described)
    with pytest.raises(DataError, match=r"not a model that encoder\.export or ranker\.export saved"):
        load_answers(tmp_path)


def test_model_is_loaded_by_the_function_that_it_names(tmp_path: Path) -> None:
    flavor = {"artifacts": {"file": {"path": "artifacts/file", "uri": "x"}}, "config": {"a": 1}}
    described = {"metadata": {"answers": f"{__name__}:loaded"}, "flavors": {"python_function": flavor}}
    (tmp_path / "MLmodel").write_text(yaml.safe_dump(described))
    assert load_answers(tmp_path)([]) == [{"file": tmp_path / "artifacts/file"}, {"a": 1}]


def loaded(artifacts: dict[str, Path], config: dict[str, Any]) -> Answers:
    """Return the answers of the model in the test above."""
    return lambda inputs: [artifacts, config]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--model", "."], "does not carry this server; export it again, or use mlflow models serve"),
        (["--model", "nowhere"], "neither a folder nor a model that MLflow finds"),
    ],
)
def test_model_that_cannot_be_served_is_reported(
    arguments: list[str], rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        serve.main(arguments)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("serve: error: --model ") and rule in error


def test_bounds_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code/infra").mkdir(parents=True)
    (tmp_path / "code/infra/scoring_app.py").touch()
    with pytest.raises(SystemExit):
        serve.main(["--model", str(tmp_path), "--max-concurrent", "0"])
    assert "serve.max_concurrent: Input should be greater than 0 (value: 0)" in capsys.readouterr().err
