"""S3 and compatible stores, by boto3, which has the conditional put that a commit needs.

Credentials, region and endpoint (`AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_S3`) come from boto3's usual chain.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from sidestack.infra.errors import RemoteError
from sidestack.infra.masking import one_line
from sidestack.infra.remote.objects import Found, Retries, UnavailableError

T = TypeVar("T")

_CONNECT_S, _READ_S, _TRIES = 4, 10, 2  # half a minute altogether
_REMOVED_AT_ONCE = 1000
_WRITER = "sidestack-writer"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

_NOT_THERE = ("NoSuchKey", "404", "NotFound")
_IS_THERE = ("PreconditionFailed", "412")
_AWAY = (
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "500",
    "502", "503", "504", "ConditionalRequestConflict", "OperationAborted", "BadGateway", "GatewayTimeout",
)  # fmt: skip
_REFUSALS = {
    ("NoSuchBucket",): "there is no such bucket; make it, or correct the URL",
    ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "ExpiredCredentials"): (
        "the credential has expired; renew it and start again: what was committed, checkpoints included, is kept"
    ),
    ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthFailure", "UnrecognizedClientException"): (
        "the store does not know the credential; see AWS_ACCESS_KEY_ID, AWS_PROFILE, or the machine's role"
    ),
    ("AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"): (
        "no permission; needed are s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it"
    ),
    ("RequestTimeTooSkewed",): "this machine's clock is wrong; set its time (NTP)",
    ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"): (
        "the bucket is in another region; set AWS_REGION to the bucket's"
    ),
    ("NotImplemented", "501"): (
        "the store has no conditional put (If-None-Match), without which two writers could both commit"
    ),
}


class S3Objects:
    """The objects of one bucket; see `infra.remote.objects.Objects`."""

    def __init__(self, bucket: str) -> None:
        """Make the client, without a request.

        Raises:
            RemoteError: boto3 is not installed, or its settings are faulty.
        """
        self._bucket = bucket
        self._retries = Retries()
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise RemoteError(f"s3://{bucket}: needs boto3 (requirements/base.txt)") from error
        settings: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "read_timeout": _READ_S,
            "retries": {"total_max_attempts": _TRIES, "mode": "standard"},
            "max_pool_connections": 32,
        }
        if any(os.environ.get(name) for name in _ENDPOINTS):  # a private server has no host name per bucket
            settings["s3"] = {"addressing_style": "path"}
        with self._translate_errors(""):
            self._client = boto3.session.Session().client("s3", config=Config(**settings))

    def read(self, key: str) -> bytes | None:
        """Return an object's bytes; None: there is none."""

        def get() -> bytes:
            body: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            return body

        return self._request(key, get, missing=True)

    def write(self, key: str, content: bytes) -> None:
        """Write an object, or replace it."""
        self._request(key, lambda: self._client.put_object(Bucket=self._bucket, Key=key, Body=content))

    def write_new(self, key: str, content: bytes, writer: str) -> bool:
        """Write an object unless there is one; return whether it is this writer's.

        If an answer is lost, the put is sent again and finds its own object, recognized by the writer in its metadata.
        """
        from botocore.exceptions import ClientError

        def put() -> bool:
            try:
                self._client.put_object(
                    Bucket=self._bucket, Key=key, Body=content, IfNoneMatch="*", Metadata={_WRITER: writer}
                )
            except ClientError as error:
                if _code(error) not in _IS_THERE:
                    raise
                found = self._client.head_object(Bucket=self._bucket, Key=key)
                return bool(found["Metadata"].get(_WRITER) == writer)
            return True

        return bool(self._request(key, put))

    def upload(self, file: Path, key: str) -> None:
        """Write a local file's bytes as an object, a large one in parts."""

        def put() -> None:
            with file.open("rb") as opened:
                self._client.upload_fileobj(opened, self._bucket, key)

        self._request(key, put)

    def download(self, key: str, file: Path) -> None:
        """Write an object's bytes into a local file."""

        def get() -> None:
            with file.open("wb") as opened:
                self._client.download_fileobj(self._bucket, key, opened)

        self._request(key, get)

    def listed(self, prefix: str, at_most: int | None = None) -> list[Found]:
        """Return the objects whose keys begin with a prefix, in order; all, or the first `at_most`."""

        def pages() -> list[Found]:
            paginator = self._client.get_paginator("list_objects_v2")
            return [
                Found(one["Key"], one["Size"], _stamp(one["LastModified"].timestamp(), one["ETag"]))
                for page in paginator.paginate(
                    Bucket=self._bucket, Prefix=prefix, PaginationConfig={"MaxItems": at_most}
                )
                for one in page.get("Contents", ())
            ]

        return self._request(prefix, pages) or []

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are ignored."""
        for start in range(0, len(keys), _REMOVED_AT_ONCE):
            some = [{"Key": key} for key in keys[start : start + _REMOVED_AT_ONCE]]

            def delete(some: Sequence[dict[str, str]] = some) -> Any:
                return self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})

            answer = self._request(keys[start], delete) or {}
            for fault in answer.get("Errors", ()):
                raise RemoteError(f"{self._url(fault['Key'])}: cannot be removed: {_refusal(fault['Code'])}")

    def _request(self, key: str, call: Callable[[], T], *, missing: bool = False) -> T | None:
        """Return the result of a call, with retries; None: there is no such object, if `missing` allows that."""

        def named() -> T | None:
            from botocore.exceptions import ClientError

            with self._translate_errors(key):
                try:
                    return call()
                except ClientError as error:
                    if missing and _code(error) in _NOT_THERE:
                        return None
                    raise

        return self._retries.call(named)

    def _url(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}".rstrip("/")

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Convert boto3's errors into ours."""
        from botocore import exceptions as theirs

        url = self._url(key)
        try:
            yield
        except theirs.ClientError as error:
            code = _code(error)
            if code in _AWAY:
                raise UnavailableError(f"{url}: the store cannot answer for now ({code})") from error
            if code in _NOT_THERE:
                raise RemoteError(f"{url}: there is no such object; it was removed meanwhile") from error
            raise RemoteError(f"{url}: {_refusal(code)}") from error
        except _credential_faults() as error:
            raise RemoteError(
                f"{url}: no credential can be had ({one_line(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
                " AWS_PROFILE, or give the machine a role"
            ) from error
        except (theirs.ConnectionError, theirs.HTTPClientError, theirs.IncompleteReadError) as error:
            endpoint = next((f" ({name})" for name in _ENDPOINTS if os.environ.get(name)), "")
            raise UnavailableError(
                f"{url}: the store cannot be reached: {one_line(error)}; see the network, and the endpoint{endpoint}"
            ) from error
        except RemoteError:
            raise
        except (theirs.BotoCoreError, ValueError) as error:  # such as an endpoint that is not an address
            raise RemoteError(f"{url}: {one_line(error)}") from error


def _credential_faults() -> tuple[type[Exception], ...]:
    from botocore import exceptions as theirs

    return (
        theirs.NoCredentialsError, theirs.PartialCredentialsError, theirs.ProfileNotFound,
        theirs.CredentialRetrievalError, theirs.TokenRetrievalError, theirs.SSOError,
    )  # fmt: skip


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _refusal(code: str) -> str:
    for codes, reason in _REFUSALS.items():
        if code in codes:
            return f"{reason} ({code})"
    return f"the store refuses it ({code})"


def _stamp(modified: float, tag: str) -> int:
    """Return a time in ns that distinguishes two versions of an object: its second, plus a fraction from its tag.

    Stores record times in seconds, and a local copy stores this stamp as its modification time.
    """
    return int(modified) * 10**9 + int(sha256(tag.encode()).hexdigest()[:12], 16) % 10**9
