"""Serve an exported model over HTTP, with limits: `python -m infra.serve --model URI [--port 5000]`.

URI is a saved model's folder (`exported/model`), the URL of one in an object store, or a URI that MLflow resolves, such
as `models:/sidestack-ranker@champion`. The process becomes uvicorn, which runs the code inside the model
(`infra.scoring_app`), not that of this checkout. A serving machine needs only the model's folder and its requirements.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sidestack.infra.config import parse
from sidestack.infra.errors import DataError, SidestackError
from sidestack.infra.manifest import fetched, is_committed
from sidestack.infra.remote.urls import SCHEMES, local_path, url_of
from sidestack.infra.scoring_app import VARIABLE, ServeConfig
from sidestack.infra.served import CODE_FOLDER, quiet_mlflow

_SERVERS = ("sidestack.infra.scoring_app", "infra.scoring_app")
"""The server's module in models' code; models of version 0.2.0 hold the packages without `sidestack` above them."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # more throughput comes from more workers
    "MALLOC_ARENA_MAX": "1",  # one thread runs the model, so more arenas would only keep freed memory
    "MALLOC_MMAP_THRESHOLD_": "131072",  # glibc would raise it, and keep the memory of a large request
}


def model_folder(model: str) -> tuple[Path, str]:
    """Return the folder of a saved model, from its path or a URI that MLflow resolves, and its server's module.

    Raises:
        DataError: there is no such model, or it does not hold the server's code.
    """
    folder = Path(model) if Path(model).is_dir() else _fetched(model) or _downloaded(model)
    for server in _SERVERS:
        if (folder / CODE_FOLDER / f"{server.replace('.', '/')}.py").is_file():
            return folder.absolute(), server
    raise DataError(f"--model {model}: does not carry this server; export it again, or use mlflow models serve")


def _fetched(url: str) -> Path | None:
    """Return the local copy of a folder in a stage's output at a URL; None: the URL is not in a stage's output."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        return None
    path = local_path(url)
    within = (folder for folder in (path, *path.parents) if url_of(folder) is not None)
    committed = next((folder for folder in within if is_committed(folder)), None)
    if committed is None:
        return None
    fetched(committed)
    return path


def _downloaded(uri: str) -> Path:
    with quiet_mlflow():
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            return Path(download_artifacts(artifact_uri=uri))
        except (MlflowException, OSError) as error:
            why, *_ = str(error).splitlines() or [""]
            raise DataError(f"--model {uri}: neither a folder nor a model that MLflow finds: {why}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by the server."""
    parser = argparse.ArgumentParser(prog="python -m infra.serve", description=__doc__)
    parser.add_argument("--model", required=True, help="a saved model's folder, or an MLflow URI")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--max-body-bytes", type=int, default=ServeConfig.model_fields["max_body_bytes"].default)
    parser.add_argument("--max-concurrent", type=int, default=ServeConfig.model_fields["max_concurrent"].default)
    arguments = parser.parse_args(argv)
    bounds = {"max_body_bytes": arguments.max_body_bytes, "max_concurrent": arguments.max_concurrent}
    try:
        folder, server = model_folder(arguments.model)
        config = parse(ServeConfig, {"model": str(folder), **bounds}, "serve")
    except SidestackError as error:
        print(f"serve: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    # -P: the working directory may be a checkout, whose code must not take precedence over the model's.
    command = [sys.executable, "-P", "-m", "uvicorn", "--factory", f"{server}:app", "--no-access-log"]
    command += ["--host", arguments.host, "--port", str(arguments.port), "--workers", str(arguments.workers)]
    # On a busy machine, importing torch takes longer than uvicorn's default of 5 s.
    command += ["--timeout-worker-healthcheck", "60"]
    own = {"PYTHONPATH": str(config.model / CODE_FOLDER), VARIABLE: config.model_dump_json()}
    os.execve(sys.executable, command, {**os.environ, **_ENVIRONMENT, **own})


if __name__ == "__main__":
    main()
