"""The error of a served model for an input that breaks a rule; imported where MLflow serves."""

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE


class WrongInput(MlflowException):  # type: ignore[misc]
    """An input that breaks a rule: HTTP 400, with the rule as its message."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule, error_code=INVALID_PARAMETER_VALUE)
        self._rule = rule

    def serialize_as_json(self) -> str:
        """Return the response's body: only the rule, without the whole input that the server puts before it."""
        self.message = self._rule
        return str(super().serialize_as_json())
