"""Evaluation of the classifier as part of an evaluator's run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events
from scipy.special import expit

from ..engines.classification_evaluation import evaluate_classification, format_classification
from ..engines.classification_report_files import write_classification_report
from ..networks.heads import MultiLabelClassifier
from .task_predictions import classification_ways

__all__ = ["ClassificationEvaluation"]

WAYS = {"unguided": False, "guided": True}


class ClassificationEvaluation:
    """Collects an evaluator's epoch and reports it: ``unguided``, without anatomical masks, and ``guided``, with them.

    See `evaluate_classification` for the figures and `write_classification_report` for the files, whose names end in
    the way. The macro figures are added to the evaluator's metrics, as ``macro_auroc_unguided`` and so on. Bootstrap
    resamples are of patients, because reconstructions of one scan are no independent cases.

    Args:
        classifier: which says what the columns are, and its thresholds.
        cases: those evaluated, for their patients.
        training_prevalence: (L,), NaN where unknown.
        output_dir: where the files go.
        num_resamples: bootstrap resamples.
        seed: of the resampling.
    """

    def __init__(
        self,
        classifier: MultiLabelClassifier,
        cases: Sequence[Mapping[str, Any]],
        training_prevalence: Sequence[float],
        output_dir: str | os.PathLike,
        num_resamples: int = 200,
        seed: int = 0,
    ) -> None:
        self.classifier = classifier
        self.patient_of = {case["volume_id"]: case["patient_id"] for case in cases}
        self.training_prevalence = np.array(training_prevalence, dtype=np.float64)
        self.output_dir = Path(output_dir)
        self.num_resamples = num_resamples
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns what `MultiLabelClassifier` or `VLM3DMultiTask` does, without
        decollation.

        Raises:
            ValueError: on several ranks, each of which would report its share as the whole.
        """
        if idist.get_world_size() > 1:
            raise ValueError(
                f"evaluation runs in one process, got {idist.get_world_size()}; leave out torchrun and ddp.json."
            )
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _begin(self, engine: Engine) -> None:
        self._volume_ids: list[str] = []
        self._rows: dict[str, list[np.ndarray]] = {"probabilities": [], "logits": [], "labels": [], "guided": []}

    def _collect(self, engine: Engine) -> None:
        state: Any = engine.state
        batch = state.batch
        for output, guided, counts in classification_ways(state.output["pred"], batch):
            kept = counts.numpy()
            self._volume_ids += [name for name, keep in zip(batch["volume_id"], kept, strict=True) if keep]
            for name in ("probabilities", "logits"):
                self._rows[name].append(output[name].double().cpu().numpy()[kept])
            self._rows["labels"].append(batch["labels"].double().numpy()[kept])
            self._rows["guided"].append(guided.numpy()[kept])

    def __call__(self, engine: Engine) -> None:
        """Measure, write, print, and add to ``engine.state.metrics``."""
        state: Any = engine.state
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        names = [finding.name for finding in self.classifier.scored_findings]
        for way, guided in WAYS.items():
            chosen = np.flatnonzero(rows["guided"] == guided)
            if not len(chosen):
                engine.logger.info(f"No case was evaluated {way}.")
                continue
            volume_ids = [self._volume_ids[row] for row in chosen]
            probabilities, labels = rows["probabilities"][chosen], rows["labels"][chosen]
            report = evaluate_classification(
                probabilities,
                labels,
                names,
                self.classifier.scored_thresholds.cpu().numpy(),
                self.training_prevalence,
                self.num_resamples,
                self.seed,
                groups=[self.patient_of[volume_id] for volume_id in volume_ids],
            )
            write_classification_report(
                report, self.output_dir, volume_ids, probabilities, labels, way, expit(rows["logits"][chosen])
            )
            macro = {f"macro_{name}_{way}": value for name, value in report.macro.items() if not math.isnan(value)}
            state.metrics.update(macro)
            engine.logger.info(f"Classification, {way}:\n{format_classification(report)}")
