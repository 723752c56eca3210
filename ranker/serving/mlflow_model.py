"""The code of the MLflow model that `ranker.export` saves ("models from code").

MLflow runs this file when it saves and when it loads the model; nothing imports it. There is no pickle: the artifact
has weights as safetensors and maps as plain integers.
"""

from pathlib import Path
from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel, ConfigDict, SkipValidation

from sidestack.infra.errors import DataError
from sidestack.infra.wrong_input import WrongInput
from sidestack.ranker.serving.model import load_answers


class User(BaseModel):
    """The user: the id, and the columns that a request has once."""

    model_config = ConfigDict(extra="allow")

    user_id: int | None = None


class History(BaseModel):
    """The user's history, oldest first; times may also be strings."""

    item_ids: list[int] = []
    times: list[float] = []


class Candidate(BaseModel):
    """An item: its id, the columns of an impression, and, for a new item, its signals."""

    model_config = ConfigDict(extra="allow")

    item_id: int | None = None


class Request(BaseModel):
    """One user, one history, candidates.

    The types are only for MLflow's signature: `ranker.serving.parse` checks values, with better messages.
    """

    model_config = ConfigDict(extra="allow")

    user: SkipValidation[User | None] = None
    time: SkipValidation[str | None] = None
    history: SkipValidation[History | None] = None
    candidates: SkipValidation[list[Candidate] | None] = None


class Answer(BaseModel):
    """Probabilities by task, and the number of unknown ids."""

    probabilities: dict[str, list[float]]
    unknown: dict[str, int]


class RankerModel(PythonModel):  # type: ignore[misc]
    """Requests in, probabilities out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the version and check that its parts fit each other."""
        self._answers = load_answers({name: Path(path) for name, path in context.artifacts.items()}, {})

    def predict(self, model_input: list[Request]) -> list[Answer]:
        """Score the candidates of requests.

        Raises:
            WrongInput: see `ServedRanker.answer`.
        """
        try:
            return self._answers([_plain(one) for one in model_input])  # type: ignore[return-value]
        except DataError as error:
            raise WrongInput(str(error)) from error


def _plain(request: Request) -> dict[str, Any]:
    values = {**request.__dict__, **(request.model_extra or {})}
    return {name: value for name, value in values.items() if value is not None}


set_model(RankerModel())
