"""Scores of the reports that an evaluator's network generates, for choosing a model on validation data."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.metrics import Metric
from monai.utils import evenly_divisible_all_gather
from torch import Tensor

from .decisions import count_decisions
from .label_arrays import mean_over_defined
from .report_rewards import ReportReward

__all__ = ["GeneratedReportScores"]


class GeneratedReportScores(Metric):
    """The clinical macro-F1 of an epoch's reports; `figures` has more.

    The network returns `vlm3d_ext.networks.nets.image_prefix_language_model.GeneratedTexts`; batches hold ``labels``
    and ``report``, and the evaluator does not decollate.

    Args:
        reward: whose extractor reads the reports, and whose mean is given beside.
    """

    def __init__(self, reward: ReportReward) -> None:
        self.reward = reward
        super().__init__(output_transform=lambda output: output)

    def attach(self, engine: Any, name: str, usage: Any = None) -> None:
        """Attach under a name; what is watched beside it is added as ``<figure>``."""
        from ignite.engine import Events

        self._name = name
        engine.add_event_handler(Events.EPOCH_STARTED, lambda _: self.reset())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def reset(self) -> None:
        """Forget what was added."""
        self._rows: list[Tensor] = []

    def _add(self, engine: Any) -> None:
        self.update((engine.state.output["pred"], engine.state.batch))

    def update(self, output: tuple[Any, Any]) -> None:
        """Add a batch: generated texts, and the batch with "labels" and "report"."""
        generated, batch = output
        labels = batch["labels"].double()
        judged = self.reward(generated.texts, generated.finished.tolist(), list(batch["report"]), labels.numpy())
        decisions = [self.reward.extractor.labels(text) for text in generated.texts]
        watched = [
            judged.total,
            judged.watched["num_positives"],
            judged.watched["num_words"],
            judged.watched["finished"],
        ]
        columns = [torch.from_numpy(values).double() for values in watched]
        self._rows.append(torch.cat([torch.stack(columns, 1), labels, torch.from_numpy(np.array(decisions))], dim=1))

    def compute(self) -> float:
        """Return the clinical macro-F1 over all ranks."""
        return self.figures()["clinical_f1"]

    def figures(self) -> dict[str, float]:
        """Return ``clinical_f1``, and the means over reports of ``reward``, ``num_positives``, ``num_words`` and
        ``finished``."""
        rows = torch.cat(self._rows)
        if idist.get_world_size() > 1:
            rows = evenly_divisible_all_gather(rows.to(idist.device()), concat=True).cpu()
        watched, findings = rows[:, :4], rows[:, 4:]
        labels, decisions = findings.chunk(2, 1)
        means = torch.nanmean(watched, 0).tolist()
        return {
            "clinical_f1": float(mean_over_defined(count_decisions(labels.numpy(), decisions.numpy() == 1).f1)),
            **dict(zip(("reward", "num_positives", "num_words", "finished"), means, strict=True)),
        }

    def _finish(self, engine: Any) -> None:
        figures = self.figures()
        engine.state.metrics[self._name] = figures["clinical_f1"]
        engine.state.metrics.update({name: value for name, value in figures.items() if name != "clinical_f1"})
