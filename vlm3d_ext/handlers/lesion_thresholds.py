"""Thresholds of the masks after each validation, so that a checkpoint holds its own."""

from __future__ import annotations

from ignite.engine import Engine, Events

from ..metrics import DiceByThreshold
from ..networks.nets import LesionLocalizationModule, PlainLocalizer

__all__ = ["LesionThresholds"]


class LesionThresholds:
    """Takes over the best thresholds of the validation epoch that has just ended.

    Goes to the evaluator on validation data, never on test data, before the checkpoint handler.

    Args:
        network: whose ``thresholds`` and ``presence_thresholds`` are filled.
        scores: the evaluator's metric; the same on every rank.
    """

    def __init__(self, network: LesionLocalizationModule | PlainLocalizer, scores: DiceByThreshold) -> None:
        self.network = network
        self.scores = scores

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Store, and log what each disease reaches."""
        self.network.thresholds.copy_(self.scores.best_thresholds)
        self.network.presence_thresholds.copy_(self.scores.presence_thresholds)
        values = zip(
            self.scores.dice.tolist(),
            self.scores.best_thresholds.tolist(),
            self.scores.presence_thresholds.tolist(),
            strict=True,
        )
        engine.logger.info(
            "Dice (threshold, presence threshold) of each disease: "
            + ", ".join(f"{dice:.3f} ({cut:.2f}, {presence:.2f})" for dice, cut, presence in values)
        )
