"""Host names that do not resolve and ports in use are reported before torchrun waits for a rendezvous."""

import socket

import pytest

from sidestack.infra import rendezvous


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 0.0)


def test_names_that_resolve_are_accepted(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    assert rendezvous.main(["127.0.0.1:20999", "1"]) == 0 and capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a" * 70, "half..empty"])
def test_first_node_whose_name_does_not_resolve_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    assert rendezvous.main([f"{name}:20999", "1"]) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"rendezvous: host '{name}' (the first node of this job") and error.count("\n") == 1


def test_node_whose_own_name_does_not_resolve_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "no-such-host.invalid")
    assert rendezvous.main(["localhost:20999", "1"]) == 1
    assert "'no-such-host.invalid' (this node's own name) does not resolve" in capfd.readouterr().err


def test_port_in_use_is_reported_on_the_first_node_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        place = f"localhost:{other.getsockname()[1]}"
        assert rendezvous.main([place, "0"]) == 1
        assert f"port {place[10:]} of localhost, where the job's nodes meet, is taken" in capfd.readouterr().err
        assert rendezvous.main([place, "1"]) == 0, "on other nodes the port may be in use: by the first node"
    assert rendezvous.main([place, "0"]) == 0


def test_check_is_repeated_until_names_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([["not yet"], ["not yet"], []])
    monkeypatch.setattr(rendezvous, "PATIENCE_S", 60.0)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(rendezvous, "faults", lambda host, port, node: next(answers))
    assert rendezvous.main(["late:1", "0"]) == 0
