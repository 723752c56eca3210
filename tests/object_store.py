"""Local S3 servers for tests: moto's server, and a server that answers every request with one error."""

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

SECRET = "do-not-print-this"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}


class Bucket:
    """A bucket of moto's server, accessed by boto3 and not by the code under test.

    Attributes:
        name: the bucket's name.
        client: boto3's client.
    """

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.name = f"bucket-{uuid.uuid4().hex[:8]}"
        self.client = boto3.client("s3", endpoint_url=endpoint)
        self.client.create_bucket(Bucket=self.name)

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def upload(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())


@contextmanager
def moto_server() -> Iterator[str]:
    """Run moto's server in a thread and yield its address."""
    server = pytest.importorskip("moto.server", reason="not installed: moto[s3,server] (requirements/teams.txt)")
    one = server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    one.start()
    host, port = one.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        one.stop()


@contextmanager
def refusing(code: str, status: int = 403) -> Iterator[tuple[str, list[str]]]:
    """Run a server that answers every request with an S3 error; yield its address and the list of requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            requests.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def use(patch: pytest.MonkeyPatch, endpoint: str, mirror: Path) -> None:
    """Set the environment so that this process and its children use an S3 server, with its test keys, and a mirror."""
    from sidestack.infra.remote import objects

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "SIDESTACK_MIRROR": str(mirror)}.items():
        patch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_CONFIG_FILE", str(mirror / "no-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(mirror / "no-credentials"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    objects._opened.cache_clear()
