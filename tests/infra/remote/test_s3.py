"""Objects in S3: the conditional put, and errors when the store refuses a request or is unreachable."""

import socket
import threading
import time
from pathlib import Path

import pytest

from sidestack.infra.errors import RemoteError
from sidestack.infra.remote import objects
from sidestack.infra.remote.objects import Objects, UnavailableError, objects_of
from tests.object_store import SECRET, Bucket, free_port, refusing, use


@pytest.fixture
def store(bucket: Bucket) -> Objects:
    return objects_of(bucket.url)[0]


def test_objects_are_written_read_listed_and_removed(store: Objects, tmp_path: Path) -> None:
    assert store.read("a/x") is None and store.listed("a/") == []
    store.write("a/x", b"one")
    store.write("a/x", b"two")
    (tmp_path / "file").write_bytes(b"three")
    store.upload(tmp_path / "file", "a/y")
    store.download("a/y", tmp_path / "copy")
    assert store.read("a/x") == b"two" and (tmp_path / "copy").read_bytes() == b"three"
    assert [(one.key, one.size) for one in store.listed("a/")] == [("a/x", 3), ("a/y", 5)]
    assert [one.key for one in store.listed("a/", at_most=1)] == ["a/x"]
    store.remove(["a/x", "a/y", "a/none"])
    assert store.listed("a/") == []


def test_one_of_many_concurrent_writers_writes_a_new_object(bucket: Bucket, store: Objects) -> None:
    start, won = threading.Barrier(6), []

    def write(writer: str) -> None:
        start.wait()
        if store.write_new("manifest", writer.encode(), writer):
            won.append(writer)

    threads = [threading.Thread(target=write, args=(f"writer-{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and bucket.get("manifest") == won[0].encode()


def test_writer_that_repeats_its_request_finds_its_own_object(store: Objects) -> None:
    assert store.write_new("manifest", b"content", "me") and store.write_new("manifest", b"content", "me")
    assert not store.write_new("manifest", b"content", "another")


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("AccessDenied", "no permission; needed are s3:GetObject"),
        ("ExpiredToken", "the credential has expired; renew it and start again"),
        ("InvalidAccessKeyId", "does not know the credential"),
        ("SignatureDoesNotMatch", "does not know the credential"),
        ("RequestTimeTooSkewed", "clock is wrong"),
        ("SomethingNew", "the store refuses it"),
    ],
)
def test_refused_request_raises_a_helpful_error_without_the_servers_message(
    code: str, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with refusing(code) as (address, _):
        use(monkeypatch, address, tmp_path)
        store, key = objects_of("s3://bucket/runs/x")
        for ask in (store.read, store.listed, lambda key: store.write_new(key, b"", "me")):
            with pytest.raises(RemoteError, match=f"s3://bucket/runs/x: .*{rule}.* \\({code}\\)") as caught:
                ask(key)
            assert SECRET not in str(caught.value)
    assert time.monotonic() - began < 10


def test_missing_bucket_is_named(bucket: Bucket, tmp_path: Path) -> None:
    store, key = objects_of("s3://no-such-bucket/runs")
    (tmp_path / "file").write_bytes(b"x")
    for ask in (store.read, store.listed, lambda key: store.upload(tmp_path / "file", key)):
        with pytest.raises(RemoteError, match="s3://no-such-bucket/runs: there is no such bucket"):
            ask(key)


def test_unreachable_store_is_reported_within_half_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, f"http://127.0.0.1:{free_port()}", tmp_path)
    began = time.monotonic()
    store, key = objects_of("s3://bucket/x")
    with pytest.raises(RemoteError, match=r"s3://bucket/x: the store cannot be reached: .*\(AWS_ENDPOINT_URL\)"):
        store.read(key)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_store_that_does_not_answer_is_reported_within_half_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
        began = time.monotonic()
        store, key = objects_of("s3://bucket/x")
        with pytest.raises(RemoteError, match="s3://bucket/x: the store cannot be reached: ReadTimeoutError"):
            store.read(key)
        assert time.monotonic() - began < 30


def test_error_for_missing_credentials_names_their_sources(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    objects._opened.cache_clear()
    store, key = objects_of(f"{bucket.url}/x")
    with pytest.raises(RemoteError, match="no credential can be had.*set AWS_ACCESS_KEY_ID"):
        store.read(key)


def test_requests_are_repeated_while_a_known_store_is_unreachable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(objects, "_PAUSE_S", 0.01)
    retries = objects.Retries()
    answers: list[object] = [UnavailableError("s3://b: away"), UnavailableError("s3://b: away"), b"content"]

    def ask() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(UnavailableError):
        retries.call(ask)
    assert retries.call(lambda: b"first") == b"first"
    assert retries.call(ask) == b"content"
    assert capsys.readouterr().err == "warning: s3://b: away; it is asked again for up to 5 minutes\n"
    monkeypatch.setattr(objects, "RETRY_S", 0.0)
    answers[:] = [UnavailableError("s3://b: away")] * 3
    with pytest.raises(UnavailableError):
        retries.call(ask)
