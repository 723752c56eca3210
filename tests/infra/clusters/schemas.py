"""Validate objects by published schemas: Volcano jobs by Volcano's CRD, others by the package kubernetes-validate.

`volcano_job.json` is a copy of Volcano's schema; its first key names its version and licence.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

KUBERNETES_VERSION = "1.34"


def faults_of_job(job: dict[str, Any]) -> list[str]:
    """Return where a Volcano job violates its schema, including unknown fields."""
    jsonschema = pytest.importorskip("jsonschema", reason="not installed: jsonschema")
    validator = jsonschema.Draft202012Validator(_volcano())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(job)]


def faults_of_pod(template: dict[str, Any]) -> list[str]:
    """Return where a pod's template violates the schema of a Pod, including unknown fields."""
    return faults_of_object({"apiVersion": "v1", "kind": "Pod", **template})


def faults_of_object(content: dict[str, Any]) -> list[str]:
    """Return where a Kubernetes object violates its schema, including unknown fields."""
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
    """Return the schema with unknown fields forbidden, which the API server would silently drop."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(one) for name, one in schema.items()}
    if "properties" in strict and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict
