"""From the tensors of evidence to what can be written into a prompt, a JSON file or a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...data.connected_components import without_faint_lesions
from ...text.lesion_locations import LesionLocationInjector
from ..heads import MultiLabelClassifier
from .lesion_localization import LesionLocalizationModule
from .scan_evidence import Evidence

__all__ = ["EvidenceInWords"]


class EvidenceInWords:
    """Names a scan's findings and places its lesions.

    Args:
        classifier: which says what the findings are, and their thresholds.
        localizer: which says what the lesions are, and theirs; None places none.
        injector: which words the lesions.
    """

    def __init__(
        self,
        classifier: MultiLabelClassifier,
        localizer: LesionLocalizationModule | None,
        injector: LesionLocationInjector,
    ) -> None:
        self.classifier = classifier
        self.localizer = localizer
        self.injector = injector

    def findings(self, probabilities: Tensor, predictions: Tensor) -> dict[str, dict[str, Any]]:
        """Return name -> ``probability``, ``threshold``, ``prediction`` (0 or 1) of one scan's findings, both (F,)."""
        rows = zip(
            [finding.name for finding in self.classifier.scored_findings],
            probabilities.tolist(),
            self.classifier.scored_thresholds.tolist(),
            predictions.tolist(),
            strict=True,
        )
        return {
            name: {"probability": probability, "threshold": threshold, "prediction": int(prediction)}
            for name, probability, threshold, prediction in rows
        }

    def lesions(self, evidence: Evidence, row: int, spacing_mm: Sequence[float]) -> list[dict[str, Any]]:
        """Return the lesions of one scan of a batch, as `LesionLocation.to_json` has them.

        Args:
            evidence: of the batch.
            row: which scan.
            spacing_mm: its `[z, y, x]`.
        """
        if self.localizer is None or evidence.lesion_probabilities is None:
            return []
        thresholds = dict(zip(self.localizer.disease_set.keys, self.localizer.thresholds.tolist(), strict=True))
        probabilities = {
            key: without_faint_lesions(values, thresholds[key], presence)
            for key, values, presence in zip(
                self.localizer.disease_set.keys,
                evidence.lesion_probabilities[row].float().cpu().numpy(),
                self.localizer.presence_thresholds.tolist(),
                strict=True,
            )
        }
        masks = {key: values >= thresholds[key] for key, values in probabilities.items()}
        found = self.injector.locate(masks, spacing_mm, evidence.regions[row].cpu().numpy(), probabilities)
        return [location.to_json() for location in found]
