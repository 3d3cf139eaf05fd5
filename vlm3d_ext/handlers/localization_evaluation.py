"""Evaluation of drawn lesions as part of an evaluator's run."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events

from ..data.atomic_files import write_bytes
from ..data.prepared_case import read_prepared_case
from ..engines.localization_case import CaseEvaluation, ScanGrids, evaluate_case, read_grids, read_truth
from ..engines.localization_evaluation import evaluate_localization, format_localization
from ..engines.localization_montage import DISEASE_COLOURS, MontageRow, draw_montage
from ..engines.localization_report_files import write_localization_report
from ..text.disease_set import DiseaseSet
from .task_predictions import lesion_probabilities

__all__ = ["HasThresholds", "LocalizationEvaluation"]


class HasThresholds(Protocol):
    """What knows from which probability on a voxel is drawn."""

    thresholds: torch.Tensor
    """(diseases,) in (0, 1]."""
    presence_thresholds: torch.Tensor
    """(diseases,) in (0, 1], what a lesion must reach somewhere."""


@dataclass(frozen=True)
class _Drawn:
    """A case whose picture may be wanted: how good it is, and its masks, which compress to kilobytes."""

    score: float
    volume_id: str
    masks: tuple[bytes, ...]
    evaluated: tuple[CaseEvaluation, ...]


class LocalizationEvaluation:
    """Measures each scan as its batch leaves the network, and reports at the end of the epoch.

    See `evaluate_case` and `evaluate_localization` for the figures, `write_localization_report` for the files. Pictures
    of the scans with the best and the worst mean Dice over their positive diseases, and of the lesion-free scan with
    the largest false positives, go to ``montages/``. The means are added to the evaluator's metrics: ``mean_dice``,
    ``dice_<disease>``, ``mean_sensitivity`` and so on, where they are defined.

    Args:
        network: whose ``thresholds`` are read when a batch arrives.
        disease_set: the order of the mask channels.
        cases: those evaluated, of a manifest, with "disease_labels": 1, 0 or NaN in the order of `disease_set`.
        output_dir: where the files go.
        num_resamples: bootstrap resamples, of patients.
        seed: of the resampling.
        num_montages: pictures of best and of worst cases, each; 0 draws none.
        baseline: (diseases, D, H, W) in [0, 1] on the prepared grids, such as how often a voxel was lesion in training;
            None compares with nothing.
        baseline_thresholds: (diseases,), from which value on the baseline counts as lesion.
    """

    def __init__(
        self,
        network: HasThresholds,
        disease_set: DiseaseSet,
        cases: Sequence[Mapping[str, Any]],
        output_dir: str | os.PathLike,
        num_resamples: int = 200,
        seed: int = 0,
        num_montages: int = 3,
        baseline: np.ndarray | None = None,
        baseline_thresholds: Sequence[float] | None = None,
    ) -> None:
        if (baseline is None) != (baseline_thresholds is None):
            raise ValueError("a baseline needs its thresholds, and the other way round; pass both or none.")
        if baseline is not None and baseline_thresholds is not None:
            lengths = {len(baseline), len(baseline_thresholds), disease_set.num_diseases}
            if len(lengths) > 1 or not all(0 < value <= 1 for value in baseline_thresholds):
                raise ValueError(
                    f"baseline and thresholds in (0, 1] are needed for {disease_set.num_diseases} diseases, got "
                    f"{len(baseline)} and {list(baseline_thresholds)}."
                )
        self.network = network
        self.disease_set = disease_set
        self.cases = {case["volume_id"]: case for case in cases}
        self.output_dir = Path(output_dir)
        self.num_resamples = num_resamples
        self.seed = seed
        self.num_montages = num_montages
        self.baseline = baseline
        self.baseline_thresholds = baseline_thresholds

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose network returns ``probabilities`` (B, diseases, D, H, W), or what
        `VLM3DMultiTask` does, without decollation.

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
        self._evaluated: list[CaseEvaluation] = []
        self._best: list[_Drawn] = []
        self._worst: list[_Drawn] = []
        self._most_false: list[_Drawn] = []

    def _collect(self, engine: Engine) -> None:
        state: Any = engine.state
        probabilities = lesion_probabilities(state.output["pred"], self.disease_set.keys).float().cpu().numpy()
        for row, volume_id in enumerate(state.batch["volume_id"]):
            self._evaluate(self.cases[volume_id], probabilities[row])

    def _evaluate(self, case: Mapping[str, Any], probabilities: np.ndarray) -> None:
        grids = read_grids(case["geometry"])
        thresholds = self.network.thresholds.tolist()
        presence_thresholds = self.network.presence_thresholds.tolist()
        masks, evaluated = [], []
        for channel, disease in enumerate(self.disease_set.keys):
            threshold = thresholds[channel]
            restored = grids.restore(probabilities[channel], threshold, presence_thresholds[channel])
            truth = read_truth(case, disease, case["disease_labels"][channel], grids)
            evaluated.append(
                evaluate_case(
                    case["volume_id"],
                    case["patient_id"],
                    disease,
                    truth,
                    restored,
                    threshold,
                    grids,
                    self._baseline(channel, grids) if truth.status == "positive" else None,
                )
            )
            if self.num_montages:
                masks.append(zlib.compress(np.packbits(restored >= threshold).tobytes(), level=1))
        self._evaluated += evaluated
        if self.num_montages:
            self._consider(case["volume_id"], tuple(masks), tuple(evaluated))

    def _baseline(self, channel: int, grids: ScanGrids) -> np.ndarray | None:
        if self.baseline is None or self.baseline_thresholds is None:
            return None
        threshold = self.baseline_thresholds[channel]
        values = np.asarray(self.baseline[channel], dtype=np.float32)
        return grids.restore(values, threshold) >= threshold

    def _consider(self, volume_id: str, masks: tuple[bytes, ...], evaluated: tuple[CaseEvaluation, ...]) -> None:
        """Keep the case's masks if it is among the best or worst so far."""
        dice = [case.dice for case in evaluated if case.status == "positive"]
        if dice:
            drawn = _Drawn(float(np.mean(dice)), volume_id, masks, evaluated)
            self._best = sorted([*self._best, drawn], key=lambda d: (-d.score, d.volume_id))[: self.num_montages]
            self._worst = sorted([*self._worst, drawn], key=lambda d: (d.score, d.volume_id))[: self.num_montages]
        false_voxels = sum(case.num_predicted_voxels for case in evaluated if case.status == "negative")
        if false_voxels and not dice:
            drawn = _Drawn(float(false_voxels), volume_id, masks, evaluated)
            self._most_false = sorted([*self._most_false, drawn], key=lambda d: (-d.score, d.volume_id))[:1]

    def __call__(self, engine: Engine) -> None:
        """Report, write, draw, print, and add to ``engine.state.metrics``."""
        state: Any = engine.state
        keys = self.disease_set.keys
        thresholds = self.network.thresholds.tolist()
        report = evaluate_localization(self._evaluated, keys, thresholds, self.num_resamples, self.seed)
        write_localization_report(report, self._evaluated, self.output_dir)
        self._draw_montages()
        means = {f"mean_{name}": report.mean[name] for name in ("dice", "surface_dice", "sensitivity", "precision")}
        means["mean_false_positives_per_negative_scan"] = report.mean["false_positives_per_negative_scan"]
        means |= {f"dice_{row['disease']}": row["dice"] for row in report.per_disease}
        state.metrics.update({name: value for name, value in means.items() if not math.isnan(value)})
        engine.logger.info(f"Localization:\n{format_localization(report)}")

    def _draw_montages(self) -> None:
        folder = self.output_dir / "montages"
        # Pictures of an earlier run in the same folder would be taken for those of this one.
        for kind in ("best", "worst", "most_false_positives"):
            for old in folder.glob(f"{kind}_*.png"):
                old.unlink()
        for kind, chosen in (
            ("best", self._best),
            ("worst", self._worst),
            ("most_false_positives", self._most_false),
        ):
            for rank, drawn in enumerate(chosen, start=1):
                write_bytes(folder / f"{kind}_{rank}_{drawn.volume_id}.png", self._montage(drawn, kind))

    def _montage(self, drawn: _Drawn, kind: str) -> bytes:
        case = self.cases[drawn.volume_id]
        grids = read_grids(case["geometry"])
        size = math.prod(grids.source.shape)
        rows = []
        for channel, (disease, evaluated) in enumerate(zip(self.disease_set.diseases, drawn.evaluated, strict=True)):
            bits = np.frombuffer(zlib.decompress(drawn.masks[channel]), dtype=np.uint8)
            prediction = np.unpackbits(bits, count=size).astype(bool).reshape(grids.source.shape)
            truth = read_truth(case, disease.key, case["disease_labels"][channel], grids)
            known = np.zeros_like(prediction) if truth.status == "negative" else truth.mask
            colour = DISEASE_COLOURS[channel % len(DISEASE_COLOURS)]
            rows.append(MontageRow(disease.key, disease.name, colour, _caption(evaluated), prediction, known))
        if kind == "most_false_positives":
            text = f"{int(drawn.score)} voxels of false positives in a scan without lesions"
        else:
            text = f"mean Dice {drawn.score:.3f}"
        image = read_prepared_case(case["image"]).imgs
        return draw_montage(f"{drawn.volume_id}: {text}", image, grids.prepared, rows, grids.source)


def _caption(case: CaseEvaluation) -> str:
    if case.status == "negative":
        return "none there"
    if case.status == "unknown":
        return "not annotated"
    found = f"{sum(case.matches.found)} of {len(case.matches.found)} found"
    return f"Dice {case.dice:.2f}, {found}" if case.status == "positive" else f"partly annotated, {found}"
