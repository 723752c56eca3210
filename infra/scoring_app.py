"""The HTTP server of an exported model: the protocol of `mlflow models serve`, with limits (`python -m infra.serve`).

    POST /invocations  {"inputs": [...]} -> {"predictions": [...]}
    GET  /ping         200, once the model is loaded (also /health)

A request that breaks a rule is refused with a short message that names the rule and repeats nothing of the body. One
thread parses JSON and runs the model, one request at a time: a model uses one core, and only one parsed body is in
memory at a time. uvicorn runs the server from the code inside the model, so that server and model have the same
version.
"""

import asyncio
import gc
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from pydantic import PositiveInt
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.config import STARTUP_FAILURE

from sidestack.infra.config import Config, parse
from sidestack.infra.errors import DataError, SidestackError
from sidestack.infra.served import ANSWERS, MODEL_FILE

Answers = Callable[[list[Any]], list[Any]]
"""A model's interface to the server: maps plain inputs to plain predictions; raises DataError if one breaks a rule."""

VARIABLE = "SIDESTACK_SERVE"
"""The environment variable by which `infra.serve` passes a `ServeConfig`, as JSON."""
READ_SECONDS = 30.0
"""How long a client may take to send its body; a slower one would block a slot that others wait for."""


class ServeConfig(Config):
    """The configuration of a server."""

    model: Path
    """The saved model's folder."""
    max_body_bytes: PositiveInt = 16 * 2**20
    """The most bytes of a request's body; above: HTTP 413."""
    max_concurrent: PositiveInt = 64
    """The most requests that a worker reads, holds or answers at once; above: HTTP 503."""


class RefusedError(Exception):
    """A refused request, with the HTTP status and the rule it breaks."""

    def __init__(self, status: int, rule: str) -> None:
        super().__init__(rule)
        self.status = status


def app() -> Starlette:
    """Return the server of the model that `VARIABLE` names; uvicorn calls it in each worker."""
    try:
        config = parse(ServeConfig, json.loads(os.environ[VARIABLE]), VARIABLE)
        return scoring_app(load_answers(config.model), config)
    except SidestackError as error:
        print(f"serve: error: {error}", file=sys.stderr)
        sys.exit(STARTUP_FAILURE)  # tells uvicorn that a restart would fail the same way


def load_answers(model: Path) -> Answers:
    """Load a saved model by the function that its metadata names.

    The function takes the artifacts' paths by name and the model's configuration, and returns `Answers`.

    Raises:
        DataError: it is not a model for this server. SidestackError: raised by the function.
    """
    try:
        described = yaml.safe_load((model / MODEL_FILE).read_bytes())
        module, _, function = described["metadata"][ANSWERS].partition(":")
        flavor = described["flavors"]["python_function"]
        artifacts = {name: model / one["path"] for name, one in flavor["artifacts"].items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"{model}: not a model that encoder.export or ranker.export saved: {error}") from error
    load: Callable[[Mapping[str, Path], Mapping[str, Any]], Answers]
    load = getattr(importlib.import_module(module), function)
    return load(artifacts, flavor.get("config") or {})


def scoring_app(answers: Answers, config: ServeConfig) -> Starlette:
    """Return the ASGI application that serves a loaded model."""
    server = _Server(answers, config)
    return Starlette(
        routes=[
            Route("/invocations", server.invocations, methods=["POST"]),
            Route("/ping", _ping),
            Route("/health", _ping),
        ]
    )


async def _ping(request: Request) -> Response:
    return Response("\n", media_type="application/json")


class _Server:
    """The request handler, with a count of the requests in progress."""

    def __init__(self, answers: Answers, config: ServeConfig) -> None:
        self._answers = answers
        self._config = config
        self._under_way = 0
        self._thread = ThreadPoolExecutor(1, "answers")

    async def invocations(self, request: Request) -> Response:
        """Return the predictions, or a refusal with the rule that the request breaks."""
        if self._under_way >= self._config.max_concurrent:
            return _refusal(
                503, f"{self._config.max_concurrent} requests are under way, the most that are taken at once"
            )
        self._under_way += 1
        try:
            body = await self._body(request)
            loop = asyncio.get_running_loop()
            return Response(
                await loop.run_in_executor(self._thread, self._answered, body), media_type="application/json"
            )
        except RefusedError as refused:
            return _refusal(refused.status, str(refused))
        except DataError as error:
            return _refusal(400, str(error))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody receives it
        finally:
            self._under_way -= 1

    async def _body(self, request: Request) -> bytearray:
        """Read the body, up to the size limit.

        Raises:
            RefusedError: it is too long, has another type, or does not arrive in time.
        """
        content_type, _, parameters = request.headers.get("content-type", "").partition(";")
        if content_type.strip().lower() != "application/json":
            raise RefusedError(415, f"Content-Type: must be application/json, is {content_type[:80]!r}")
        if parameters.strip().lower() not in ("", "charset=utf-8"):
            raise RefusedError(415, f"Content-Type: may have charset=utf-8 alone, has {parameters.strip()[:80]!r}")
        most = self._config.max_body_bytes
        too_long = RefusedError(413, f"body: is longer than {most:,} bytes")
        if int(request.headers.get("content-length", 0)) > most:  # h11 has checked that it is a number
            raise too_long
        body = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_long
        except TimeoutError:
            raise RefusedError(408, f"body: was not sent within {READ_SECONDS:.0f} s") from None
        return body

    def _answered(self, body: bytearray) -> bytes:
        return json.dumps({"predictions": self._answers(read_inputs(body))}, allow_nan=False).encode()


def read_inputs(body: bytes | bytearray) -> list[Any]:
    """Parse the inputs in a body.

    Raises:
        DataError: it is not JSON, or not of the form ``{"inputs": [...]}``.
    """
    gc.disable()  # JSON has no cycles, and the search for them takes most of the time for a million lists
    try:
        values = json.loads(body)
    except RecursionError:
        raise DataError("body: lists and objects lie too deep within each other") from None
    except UnicodeDecodeError as error:
        raise DataError(f"body: is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"body: is not JSON: {error}") from None
    except ValueError:  # the other error that `json` raises
        raise DataError(f"body: an integer has more than {sys.get_int_max_str_digits():,} digits") from None
    finally:
        gc.enable()
    if not isinstance(values, dict) or values.keys() != {"inputs"} or not isinstance(values["inputs"], list):
        raise DataError('body: must be an object with one field, {"inputs": [...]}')
    return values["inputs"]


def _refusal(status: int, rule: str) -> Response:
    """Return a response of MLflow's form."""
    code = {503: "TEMPORARILY_UNAVAILABLE"}.get(status, "INVALID_PARAMETER_VALUE")
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"error_code": code, "message": rule}, status, headers)
