"""Checkpoints that survive an interruption at any moment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator, Trainer

from ..checkpoint_files import CheckpointError, read_checkpoint
from ..data.atomic_files import whole_or_absent

__all__ = ["ResumableCheckpoint"]

_START_AGAIN = "Start without --resume, or point --ckpt_dir at the run."


class ResumableCheckpoint:
    """Writes ``last.pt`` after each epoch, ``model.pt`` when validation has improved, and continues from ``last.pt``.

    MONAI's `CheckpointSaver` forgets the best metric when a run is resumed, and then replaces the best model by a worse
    one; here the best value travels in ``last.pt``. Files are renamed into place when whole. Only rank 0 writes. The
    same instance is put into the handlers of the trainer (last, so that the others have done their work) and of the
    evaluator.

    ``model.pt`` holds `objects` and the lineage. ``last.pt`` holds also `training_objects`, the trainer's position and
    the best metric.

    Args:
        save_dir: where both files go.
        objects: name -> object with `state_dict`, for both files; later bundles read "model".
        training_objects: name -> object with `state_dict` and `load_state_dict`, needed to continue only: optimizer,
            scheduler, history.
        metric_name: which of the evaluator's metrics decides; None keeps the newest as model.pt.
        lower_is_better: sense of the metric.
        lineage: object whose `state_dict` is stored with both.
        resume: load last.pt when training starts.
        save_interval: epochs between two last.pt.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike,
        objects: Mapping[str, Any],
        training_objects: Mapping[str, Any] | None = None,
        metric_name: str | None = None,
        lower_is_better: bool = False,
        lineage: Any | None = None,
        resume: bool = False,
        save_interval: int = 1,
    ) -> None:
        self.save_dir = Path(save_dir)
        self.objects = dict(objects)
        self.training_objects = dict(training_objects or {})
        self.metric_name = metric_name
        self.lower_is_better = lower_is_better
        self.lineage = lineage
        self.resume = resume
        self.save_interval = save_interval
        self.best_metric: float | None = None
        self.best_epoch: int | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer (last.pt, resuming) or to an evaluator (model.pt)."""
        if isinstance(engine, Trainer):
            if self.resume:
                engine.add_event_handler(Events.STARTED, self.load_last)
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.save_interval), self.save_last)
            engine.add_event_handler(Events.COMPLETED, self._save_rest)
        elif isinstance(engine, Evaluator):
            engine.add_event_handler(Events.COMPLETED, self.save_if_best)
        else:
            raise TypeError(f"ResumableCheckpoint goes to a MONAI Trainer or Evaluator, got {type(engine).__name__}.")

    def save_if_best(self, evaluator: Engine) -> None:
        """Write model.pt if the evaluator's metric is the best so far.

        NaN (no validation case has a positive) is never the best; while there was nothing else yet, the newest epoch is
        kept, with a warning, so that there is a model at all.

        Raises:
            ValueError: if the evaluator has no such metric.
        """
        if self.metric_name is not None:
            if self.metric_name not in evaluator.state.metrics:
                raise ValueError(
                    f"the evaluator has no metric {self.metric_name!r}; it has {sorted(evaluator.state.metrics)}."
                )
            value = float(evaluator.state.metrics[self.metric_name])
            best = self.best_metric
            if math.isnan(value):
                if best is not None:
                    return
                evaluator.logger.warning(
                    f"{self.metric_name} is not a number, because no validation case has a positive or because "
                    f"training "
                    f"diverged: model.pt is the newest epoch, not the best one."
                )
            elif best is None or (value < best if self.lower_is_better else value > best):
                self.best_metric, self.best_epoch = value, int(evaluator.state.epoch)
            else:
                return
        self._write("model.pt", {"best_metric": self.best_metric, "best_epoch": self.best_epoch})

    def save_last(self, trainer: Trainer) -> None:
        """Write last.pt."""
        training = {name: item.state_dict() for name, item in self.training_objects.items()}
        scaler = getattr(trainer, "scaler", None)
        self._write(
            "last.pt",
            {
                **training,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "trainer": {"epoch": trainer.state.epoch, "iteration": trainer.state.iteration},
                "best_metric": self.best_metric,
                "best_epoch": self.best_epoch,
            },
        )

    def _save_rest(self, trainer: Trainer) -> None:
        """Write last.pt at the end, unless the last epoch has just done so."""
        if trainer.state.epoch % self.save_interval:
            self.save_last(trainer)

    def load_last(self, trainer: Trainer) -> None:
        """Put everything back as last.pt has it.

        Raises:
            FileNotFoundError: if there is no last.pt.
            CheckpointError: if it is damaged, or was written by a run that kept other objects.
            LineageError: if it belongs to another bundle, phase or data set.
        """
        path = self.save_dir / "last.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: nothing to resume from. {_START_AGAIN}")
        content = read_checkpoint(path, hint=_START_AGAIN)
        absent = [name for name in (*self.objects, *self.training_objects) if name not in content]
        if absent or "trainer" not in content:
            raise CheckpointError(
                f"{path} has no entry {(absent or ['trainer'])[0]!r}, so it is of another run. {_START_AGAIN}"
            )
        if self.lineage is not None:
            self.lineage.load_state_dict(content["lineage"])  # refuses a run on other data
        for name, item in {**self.objects, **self.training_objects}.items():
            item.load_state_dict(content[name])
        scaler = getattr(trainer, "scaler", None)
        if scaler is not None and content["scaler"] is not None:
            scaler.load_state_dict(content["scaler"])
        trainer.state.epoch = content["trainer"]["epoch"]
        trainer.state.iteration = content["trainer"]["iteration"]
        self.best_metric, self.best_epoch = content["best_metric"], content["best_epoch"]
        trainer.logger.info(f"Resumed from {path} after epoch {trainer.state.epoch}.")

    def _write(self, name: str, further: Mapping[str, Any]) -> None:
        if int(os.environ.get("RANK", "0")) > 0:
            return
        content = {key: item.state_dict() for key, item in self.objects.items()}
        content.update(further)
        if self.lineage is not None:
            content["lineage"] = self.lineage.state_dict()
        # straight to the disk, not through memory: a checkpoint may be larger than what memory is left
        with whole_or_absent(self.save_dir / name) as file:
            torch.save(content, file)
