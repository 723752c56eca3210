"""The code of the MLflow model that `encoder.export` saves ("models from code").

MLflow runs this file, with the model's configuration, when it saves and when it loads the model;
nothing imports it. There is no pickle: the weights are an artifact, the bundle's safetensors.
"""

from pathlib import Path

from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from pydantic import BaseModel

from sidestack.encoder.serving import ServedConfig, ServedSid, answer_type, item_type, load_answers
from sidestack.infra.config import parse, plain
from sidestack.infra.errors import DataError
from sidestack.infra.wrong_input import WrongInput

CONFIG = parse(ServedConfig, ModelConfig().to_dict(), "the served model's configuration")


class SidModel(PythonModel):  # type: ignore[misc]
    """An MLflow model that maps signals to SIDs and digits."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights and check them against the SIDs' fingerprint."""
        self._answers = load_answers({name: Path(path) for name, path in context.artifacts.items()}, plain(CONFIG))

    def predict(self, model_input: list[BaseModel]) -> list[ServedSid]:
        """Encode items.

        Raises:
            WrongInput: see `ServedEncoder.answers`.
        """
        try:
            return self._answers([{**item.__dict__, **(item.model_extra or {})} for item in model_input])
        except DataError as error:
            raise WrongInput(str(error)) from error

    # MLflow takes the signature from the annotations, and these depend on the encoder.
    predict.__annotations__ = {"model_input": list[item_type(CONFIG.signals)], "return": list[answer_type(CONFIG.spec)]}  # type: ignore[misc]


set_model(SidModel())
