"""Inference's product of the classifier: findings on disk."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

from ..data.prediction_store import PredictionStore
from ..networks.heads import MultiLabelClassifier
from .task_predictions import own_classification

__all__ = ["PredictionWriter"]


class PredictionWriter:
    """Writes each batch's probabilities and predictions as soon as they are there.

    Args:
        store: where to.
        classifier: which says what the columns are.
    """

    def __init__(self, store: PredictionStore, classifier: MultiLabelClassifier) -> None:
        self.store = store
        self.classifier = classifier

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns what `MultiLabelClassifier` or `VLM3DMultiTask` does, without
        decollation."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the findings of the batch."""
        state: Any = engine.state
        output, batch = own_classification(state.output["pred"]), state.batch
        names = [finding.name for finding in self.classifier.scored_findings]
        for row, volume_id in enumerate(batch["volume_id"]):
            self.store.write(
                volume_id,
                names,
                output["probabilities"][row].float().tolist(),
                self.classifier.scored_thresholds.tolist(),
                output["predictions"][row].tolist(),
                self.classifier.scored_is_trained,
            )
