"""Clip the gradients between backward and the optimizer's step."""

from __future__ import annotations

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer, Trainer
from monai.engines.utils import IterationEvents

__all__ = ["GradientClipping"]


class GradientClipping:
    """Scales the gradients down to a total L2 norm of at most `max_norm`, over all parameters of the trainer's
    optimizer.

    It acts at ``BACKWARD_COMPLETED``, which MONAI's trainers fire between ``loss.backward()`` and the optimizer's
    step, and only in the iterations that do step, so with ``accumulation_steps`` it is the accumulated gradient that
    is clipped. With mixed precision the gradients are unscaled first.

    After each step ``engine.state.gradient_norm`` is the norm before clipping, and
    ``engine.state.metrics["gradient_norm"]`` its mean over the steps of the epoch so far, so that every logger of
    metrics shows it.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013.

    Args:
        max_norm: largest allowed norm; greater than 0. Infinity only measures.
        error_if_nonfinite: stop when the norm is NaN or infinite, before the weights are spoilt. With a loss scaler
            such steps are expected now and then; the scaler skips them, and they neither stop the run nor count in
            the mean.

    Raises:
        ValueError: if `max_norm` is not greater than 0.
    """

    def __init__(self, max_norm: float, error_if_nonfinite: bool = True) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be greater than 0, got {max_norm}.")
        self.max_norm = max_norm
        self.error_if_nonfinite = error_if_nonfinite
        self._sum = 0.0
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Attach to a MONAI trainer.

        Raises:
            TypeError: if the engine is not a trainer.
        """
        # MONAI attaches handlers before it gives the trainer its optimizer, so only the class can be checked here
        if not isinstance(engine, Trainer):
            raise TypeError(f"GradientClipping goes to a MONAI Trainer, got {type(engine).__name__}.")
        engine.add_event_handler(Events.EPOCH_STARTED, self._forget)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Clip the gradients if this iteration ends with a step.

        Raises:
            RuntimeError: if the norm is not finite, without a loss scaler and with `error_if_nonfinite`.
        """
        if not _steps_now(engine):
            return
        scaler = engine.scaler if engine.scaler is not None and engine.scaler.is_enabled() else None
        if scaler is not None:
            scaler.unscale_(engine.optimizer)
        parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_norm))
        engine.state.gradient_norm = norm
        if norm == norm and norm != float("inf"):
            self._sum += norm
            self._count += 1
            engine.state.metrics["gradient_norm"] = self._sum / self._count
        elif scaler is None and self.error_if_nonfinite:
            raise RuntimeError(
                f"the gradient norm is {norm} at iteration {engine.state.iteration} (epoch {engine.state.epoch}); "
                f"lower the learning rate, or look for NaN in this batch's images."
            )

    def _forget(self, engine: Engine) -> None:
        self._sum, self._count = 0.0, 0


def _steps_now(engine: SupervisedTrainer) -> bool:
    """Whether this iteration ends with an optimizer step, by the rule of `monai.engines.SupervisedTrainer`."""
    every = getattr(engine, "accumulation_steps", 1)
    if every == 1:
        return True
    length = engine.state.epoch_length
    position = engine.state.iteration - 1 if length is None else (engine.state.iteration - 1) % length
    return (position + 1) % every == 0 or position + 1 == length
