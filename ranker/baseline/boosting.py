"""One gradient-boosted classifier per task, with the number of trees chosen on the latest training rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier

from sidestack.ranker.baseline.config import BaselineConfig

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TaskModel:
    """The predictor of one task.

    Attributes:
        rows: the number of rows it was fitted on. rate: the prediction without a classifier.
        classifier: None if the training rows lack one of the labels, or no feature varies.
    """

    rows: int
    rate: float
    classifier: HistGradientBoostingClassifier | None = None

    @property
    def trees(self) -> int:
        """The number of trees."""
        return 0 if self.classifier is None else int(self.classifier.n_iter_)

    def predict(self, x_NF: Floats) -> Floats:
        """Return the probability that the task happens, given that its ancestors did, float32 [N]."""
        if self.classifier is None:
            return np.full(len(x_NF), self.rate, np.float32)
        probabilities_N: Floats = self.classifier.predict_proba(x_NF)[:, 1].astype(np.float32)
        return probabilities_N


def fit_task(
    x_NF: Floats, labels_N: NDArray[np.int8], is_category_F: NDArray[np.bool_], config: BaselineConfig
) -> TaskModel:
    """Fit one task.

    Args:
        x_NF: features of the rows on which the task is judged, in order of date; NaN is a value of its own.
        labels_N: 0 or 1. is_category_F: which features are categories. config: the settings.
    """
    rows, positives = len(labels_N), int(labels_N.sum())
    rate = (positives + 1) / (rows + 2)
    if not _has_both(labels_N) or not x_NF.shape[1]:
        return TaskModel(rows, rate)
    trees = _best_trees(x_NF, labels_N, is_category_F, config)
    classifier = _classifier(config, is_category_F, max_iter=trees, early_stopping=False)
    return TaskModel(rows, rate, classifier.fit(x_NF, labels_N))


def _best_trees(
    x_NF: Floats, labels_N: NDArray[np.int8], is_category_F: NDArray[np.bool_], config: BaselineConfig
) -> int:
    """Return the number of trees, fitted on the earlier rows, with the lowest log loss on the latest rows."""
    cut = round(len(labels_N) * (1 - config.stopping_share))
    if not (_has_both(labels_N[:cut]) and _has_both(labels_N[cut:])):
        return config.max_iter
    classifier = _classifier(config, is_category_F, max_iter=config.max_iter, early_stopping=True)
    classifier.fit(x_NF[:cut], labels_N[:cut], X_val=x_NF[cut:], y_val=labels_N[cut:])
    return max(1, int(np.argmax(classifier.validation_score_)))  # entry 0 has no tree


def _classifier(
    config: BaselineConfig, is_category_F: NDArray[np.bool_], **stopping: Any
) -> HistGradientBoostingClassifier:
    return HistGradientBoostingClassifier(
        learning_rate=config.learning_rate,
        max_leaf_nodes=config.max_leaf_nodes,
        min_samples_leaf=config.min_samples_leaf,
        max_features=config.max_features,
        n_iter_no_change=config.n_iter_no_change,
        categorical_features=is_category_F,
        random_state=config.seed,
        **stopping,
    )


def _has_both(labels_N: NDArray[np.int8]) -> bool:
    return len(labels_N) > 0 and bool(labels_N.min() != labels_N.max())
