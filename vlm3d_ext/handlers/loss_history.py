"""The whole curve of a run in one file."""

from __future__ import annotations

import math
import os
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, Trainer

from ..data.atomic_files import write_json

__all__ = ["LossHistory"]


class LossHistory:
    """Keeps a row per epoch and writes all to a JSON file: mean training losses, learning rates, validation metrics.

    A figure's mean is over the iterations that have it, as a finite number: what reinforcement learning watches is not
    there in all of them. A mean over none, and a loss that is not finite in any iteration, is null.

    It has a `state_dict`, so a resumed run continues the rows of the interrupted one. Goes to the trainer's handlers
    after the validation, and to the evaluator's.

    Args:
        path: the JSON file, rows ``{"epoch", "iteration", "loss", "losses", "learning_rates", "validation"}``;
            a value that is not finite is null.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._validation: dict[str, float | None] | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, or to its evaluator."""
        if isinstance(engine, Trainer):
            engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        elif isinstance(engine, Evaluator):
            engine.add_event_handler(Events.COMPLETED, self._keep_metrics)
        else:
            raise TypeError(f"LossHistory goes to a MONAI Trainer or Evaluator, got {type(engine).__name__}.")

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from stored rows."""
        self.rows = list(state["rows"])

    def _begin(self, trainer: Engine) -> None:
        self._sums, self._counts, self._validation = {}, {}, None

    def _add(self, trainer: Any) -> None:
        output = trainer.state.output
        values = {"loss": output["loss"]}
        if isinstance(output["pred"], dict):
            values.update(output["pred"].get("losses", {}))
        for name, value in values.items():
            number = float(value.detach())
            # a loss that is not a number must show; what is only watched may be undefined now and then
            counts = name == "loss" or math.isfinite(number)
            self._sums[name] = self._sums.get(name, 0.0) + (number if counts else 0.0)
            self._counts[name] = self._counts.get(name, 0) + counts

    def _keep_metrics(self, evaluator: Engine) -> None:
        self._validation = {name: _finite(float(value)) for name, value in evaluator.state.metrics.items()}

    def _finish(self, trainer: Any) -> None:
        names = list(self._sums)
        rows = [[self._sums[name], float(self._counts[name])] for name in names]
        total = torch.as_tensor(idist.all_reduce(torch.tensor(rows, dtype=torch.float64)))
        means = (total[:, 0] / total[:, 1]).tolist()
        losses = {name: _finite(value) for name, value in zip(names, means, strict=True)}
        self.rows.append(
            {
                "epoch": trainer.state.epoch,
                "iteration": trainer.state.iteration,
                "loss": losses.pop("loss"),
                "losses": losses,
                "learning_rates": [float(group["lr"]) for group in trainer.optimizer.param_groups],
                "validation": self._validation,
            }
        )
        if idist.get_rank() == 0:
            write_json(self.path, self.rows)


def _finite(value: float) -> float | None:
    """Return the value, or None where JSON has no word for it: a metric may be undefined in a run that is sound."""
    return value if math.isfinite(value) else None
