"""Thresholds of the masks after each validation, so that a checkpoint holds its own."""

from __future__ import annotations

from ignite.engine import Engine, Events
from torch import Tensor

from ..metrics import DiceByThreshold

__all__ = ["LesionThresholds"]


class LesionThresholds:
    """Takes over the best thresholds of the validation epoch that has just ended.

    Goes to the evaluator on validation data, never on test data, before the checkpoint handler.

    Args:
        thresholds: (L,) buffer of the localizer, which is filled.
        scores: the evaluator's metric; the same on every rank.
    """

    def __init__(self, thresholds: Tensor, scores: DiceByThreshold) -> None:
        self.thresholds = thresholds
        self.scores = scores

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Store, and log what each disease reaches."""
        self.thresholds.copy_(self.scores.best_thresholds)
        values = zip(self.scores.dice.tolist(), self.scores.best_thresholds.tolist(), strict=True)
        engine.logger.info(
            "Dice (threshold) of each disease: " + ", ".join(f"{dice:.3f} ({cut:.2f})" for dice, cut in values)
        )
