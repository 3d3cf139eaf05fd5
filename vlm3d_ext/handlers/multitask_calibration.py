"""Calibration of the joint network's findings after each validation, so that a checkpoint holds its own."""

from __future__ import annotations

import numpy as np
from ignite.engine import Engine, Events

from ..metrics import MultiLabelScores, fit_thresholds
from ..metrics.lesion_fusion import fit_lesion_fusion
from ..networks.nets import VLM3DMultiTask
from .classifier_calibration import calibrate

__all__ = ["MultiTaskCalibrator"]


class MultiTaskCalibrator:
    """Calibrates the classifier as `ClassifierCalibrator` does, then fits, for each finding that is drawn too, how far
    to believe the classifier and how far the lesions (`vlm3d_ext.metrics.lesion_fusion`), and its threshold.

    Goes to the evaluator on validation data, never on test data, before the checkpoint handler.

    Args:
        network: whose buffers are filled.
        scores: the evaluator's metric of `MultiTaskTraining`'s findings: columns of the classifier's logits, then those
            of the diseases' evidence; the same on every rank.
    """

    def __init__(self, network: VLM3DMultiTask, scores: MultiLabelScores) -> None:
        self.network = network
        self.scores = scores

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Fit and store, and log what each finding's weights are."""
        network, classifier = self.network, self.network.classification.classifier
        num_findings = classifier.label_set.num_findings
        logits, evidence = self.scores.logits[:, :num_findings], self.scores.logits[:, num_findings:]
        labels = self.scores.labels[:, :num_findings]
        calibrate(classifier, logits, labels)
        network.forget_fusion()
        told = []
        for finding, disease in network.drawn_findings.items():
            fusion = fit_lesion_fusion(logits[:, finding], evidence[:, disease], labels[:, finding])
            name = classifier.label_set.names[finding]
            if fusion is None:
                told.append(f"{name} not fused: too few cases")
                continue
            network.fuse(finding, fusion.classifier, fusion.lesion, fusion.offset)
            probabilities = fusion.probabilities(logits[:, finding], evidence[:, disease])
            threshold = np.clip(fit_thresholds(probabilities[:, None], labels[:, finding][:, None])[0], 1e-6, 1 - 1e-6)
            classifier.thresholds[finding] = float(threshold)
            told.append(f"{name} {fusion.classifier:.2f}, {fusion.lesion:.2f} ({threshold:.2f})")
        engine.logger.info(f"Weights of classifier and lesions (threshold) of the drawn findings: {'; '.join(told)}")
