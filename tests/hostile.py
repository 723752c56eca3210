"""Check that a server of exported models refuses malicious requests and keeps running."""

from collections.abc import Mapping
from http.client import HTTPConnection

from sidestack.benchmarks.scoring_server import HOST, ScoringServer

LONGEST_MESSAGE = 400
MEMORY_MIB = 128
"""How much the server's resident memory may grow over all requests."""


def require_refusals(server: ScoringServer, good: bytes, refused: Mapping[bytes, str]) -> None:
    """Check that each body is answered by status 400 and a short message, and that the server then works as before.

    Args:
        server: a running server.
        good: a valid body.
        refused: the beginning of the error message, by invalid body.
    """
    assert server.post(good)[0] == 200
    before = server.resident_mib()
    for body, rule in refused.items():
        status, answer = server.post(body)
        assert (status, answer["message"][: len(rule)]) == (400, rule)
        assert len(answer["message"]) < LONGEST_MESSAGE
    _require_no_long_body(server)
    assert server.resident_mib() < before + MEMORY_MIB
    assert server.post(good)[0] == 200


def _require_no_long_body(server: ScoringServer) -> None:
    """Check that 100 MB (with Content-Length, and chunked) and another content type are refused."""
    connection = server.connect()
    for body in (b"[" * 10**8, (b"[" * 10**6 for _ in range(100))):
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        assert _answer(connection) == (413, b"body: is longer than 16,777,216 bytes")
    connection.request("POST", "/invocations", b"brand\n3\n", {"Content-Type": "text/csv"})
    assert _answer(connection) == (415, b"Content-Type: must be application/json, is 'text/csv'")
    connection.close()


def _answer(connection: HTTPConnection) -> tuple[int, bytes]:
    assert connection.host == HOST
    response = connection.getresponse()
    return response.status, response.read().split(b'"message":"')[1].removesuffix(b'"}')
