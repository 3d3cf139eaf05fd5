"""Evaluation of the report generator, from the reports that a run has written."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from ignite.engine import Engine, Events

from ..data.evidence_store import EvidenceStore
from ..data.report_store import ReportStore
from ..engines.report_evaluation import (
    evaluate_reports,
    format_reports,
    nearest_reports,
    normal_report,
    random_reports,
)
from ..engines.report_files import write_report_evaluation
from ..text.finding_extractor import FindingExtractor
from ..text.label_set import LabelSet
from ..transforms.load_evidence import reference_report

__all__ = ["ReportEvaluationWriter"]

logger = logging.getLogger(__name__)


class ReportEvaluationWriter:
    """Measures the reports of a test split when an evaluator has written them, or when called.

    Beside the generated reports stand the same generator shown *other patients' scans*, training reports drawn at
    random, a report that denies everything, and the report of the training case with the nearest features; and, as what
    the extractor allows at best, the reference reports themselves.

    Args:
        store: the generated reports.
        control_store: those of other patients' scans; None leaves that control out.
        cases: the cases, with labels of the label set.
        training_cases: with reports; for the baselines.
        evidence_store: with the features of both.
        label_set: whose findings are read out of the texts.
        output_dir: where the files go; see `write_report_evaluation`.
        num_resamples: bootstrap resamples, of patients.
        seed: of the resampling and of the random reports.
        with_meteor_1_5: also METEOR 1.5, the challenge's, in Java.
    """

    def __init__(
        self,
        store: ReportStore,
        control_store: ReportStore | None,
        cases: Sequence[Mapping[str, Any]],
        training_cases: Sequence[Mapping[str, Any]],
        evidence_store: EvidenceStore,
        label_set: LabelSet | str,
        output_dir: str | os.PathLike,
        num_resamples: int = 200,
        seed: int = 0,
        with_meteor_1_5: bool = False,
    ) -> None:
        self.store = store
        self.control_store = control_store
        self.cases = list(cases)
        self.training_cases = list(training_cases)
        self.evidence_store = evidence_store
        self.extractor = FindingExtractor(label_set)
        self.output_dir = Path(output_dir)
        self.num_resamples = num_resamples
        self.seed = seed
        self.with_meteor_1_5 = with_meteor_1_5

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator, after the handler that writes the reports.

        Raises:
            ValueError: on several ranks, each of which would report its share as the whole.
        """
        if idist.get_world_size() > 1:
            raise ValueError(
                f"evaluation runs in one process, got {idist.get_world_size()}; leave out torchrun and ddp.json."
            )
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._add_metrics)

    def _add_metrics(self, engine: Engine) -> None:
        engine.state.metrics.update(self.evaluate())

    def evaluate(self) -> dict[str, float]:
        """Measure, write, print; return the figures of the generated reports, and each other system's clinical F1."""
        ids = [case["volume_id"] for case in self.cases]
        training_reports = [reference_report(case) for case in self.training_cases]
        texts = {
            "generated": [self.store.read(volume_id)["report_text"] for volume_id in ids],
            **self._control(ids),
            "nearest neighbour": nearest_reports(
                self._features(self.cases), self._features(self.training_cases), training_reports
            ),
            "random report": random_reports(len(ids), training_reports, self.seed),
            "all normal": [normal_report(self.extractor.label_set)] * len(ids),
            "reference": [reference_report(case) for case in self.cases],
        }
        evaluation = evaluate_reports(
            texts,
            texts["reference"],
            np.array([case["labels"] for case in self.cases], dtype=np.float64),
            ids,
            self.extractor,
            self.num_resamples,
            self.seed,
            groups=[case["patient_id"] for case in self.cases],
            with_meteor_1_5=self.with_meteor_1_5,
        )
        write_report_evaluation(evaluation, self.output_dir, texts, texts["reference"])
        table = format_reports({system.name: system.figures for system in evaluation.systems})
        logger.info("Reports of %d cases:\n%s", len(ids), table)
        metrics = {name: value for name, value in evaluation.systems[0].figures.items() if not math.isnan(value)}
        for system in evaluation.systems[1:]:
            name = system.name.replace("'", "").replace(" ", "_")
            metrics[f"clinical_f1_{name}"] = system.figures["clinical_f1"]
        return metrics

    def _control(self, ids: Sequence[str]) -> dict[str, list[str]]:
        if self.control_store is None:
            return {}
        return {"other patients' scans": [self.control_store.read(volume_id)["report_text"] for volume_id in ids]}

    def _features(self, cases: Sequence[Mapping[str, Any]]) -> np.ndarray:
        rows = []
        for case in cases:
            features = self.evidence_store.read_features(case["volume_id"])
            rows.append(np.concatenate([features["global_features"], features["region_features"].ravel()]))
        return np.stack(rows)
