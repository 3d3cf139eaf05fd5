"""Calibration of the classifier after each validation, so that a checkpoint holds its own."""

from __future__ import annotations

import numpy as np
import torch
from ignite.engine import Engine, Events

from ..metrics import MultiLabelScores, fit_calibration
from ..networks.heads import MultiLabelClassifier

__all__ = ["ClassifierCalibrator", "calibrate"]


class ClassifierCalibrator:
    """Fits temperature, offsets and thresholds on the validation epoch that has just ended.

    Goes to the evaluator on validation data, never on test data, before the checkpoint handler.

    Args:
        classifier: whose buffers are filled.
        scores: the evaluator's metric that holds the logits and labels of the epoch; the same on every rank.
    """

    def __init__(self, classifier: MultiLabelClassifier, scores: MultiLabelScores) -> None:
        self.classifier = classifier
        self.scores = scores

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Fit and store."""
        calibrate(self.classifier, self.scores.logits, self.scores.labels)


def calibrate(classifier: MultiLabelClassifier, logits: np.ndarray, labels: np.ndarray) -> None:
    """Fit and store temperature, offsets and thresholds; both arrays are (N, L), labels 1, 0 or NaN."""
    calibration = fit_calibration(logits, labels)
    classifier.temperature.fill_(calibration.temperature)
    classifier.offsets.copy_(torch.from_numpy(calibration.offsets))
    # in float32 a threshold just below 1 would become 1, which nothing can reach or be rescaled to
    thresholds = torch.from_numpy(calibration.thresholds).clamp(max=1 - torch.finfo(torch.float32).eps)
    classifier.thresholds.copy_(thresholds)
