"""The published schemas of Kubernetes objects: Volcano's from its CRD, those of Kubernetes from a package.

`volcano_job.json` is a copy of Volcano's; its first key says of which version, and under which licence.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

KUBERNETES_VERSION = "1.34"


def faults_of_job(job: dict[str, Any]) -> list[str]:
    """Return where a Volcano job breaks its schema, an unknown field included."""
    jsonschema = pytest.importorskip("jsonschema", reason="not installed: jsonschema")
    validator = jsonschema.Draft202012Validator(_volcano())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)]


def faults_of_pod(template: dict[str, Any]) -> list[str]:
    """Return where a pod's template breaks the schema of a Pod, an unknown field included."""
    return faults_of_object({"apiVersion": "v1", "kind": "Pod", **template})


def faults_of_object(content: dict[str, Any]) -> list[str]:
    """Return where a Kubernetes object breaks its schema, an unknown field included."""
    validator = pytest.importorskip("kubernetes_validate", reason="not installed: kubernetes-validate")
    from jsonschema import ValidationError

    try:
        validator.validate(content, KUBERNETES_VERSION, strict=True)
    except ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


@cache
def _volcano() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((Path(__file__).parent / "volcano_job.json").read_text())
    return _strict(schema)


def _strict(schema: Any) -> Any:
    """Refuse the fields that the API server drops in silence, and know its own word for a number or a text."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(one) for name, one in schema.items()}
    if "properties" in strict and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
