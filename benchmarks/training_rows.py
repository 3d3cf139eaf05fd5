"""The row of a training step: its seconds, its operations, and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .device_clock import MachineRates, middle_and_spread, step_seconds
from .row import Row
from .shipped_training import ShippedTraining

__all__ = ["timed_training", "training_figures"]

_GIB = 2**30


def timed_training(
    name: str,
    what: str,
    target: float | None,
    training: ShippedTraining,
    batch: Mapping[str, Any],
    num_steps: int,
    equality: str,
    rates: MachineRates,
    figures: Mapping[str, Any],
) -> Row:
    """Time steps on one batch, after three that are not measured and one whose operations are counted."""
    seconds, spread, more = training_figures(training, batch, num_steps, rates)
    return Row(
        name, what, seconds, target, equality, spread=spread, figures={**figures, **more, **rates.figures()}
    )  # fmt: skip


def training_figures(
    training: ShippedTraining, batch: Mapping[str, Any], num_steps: int, rates: MachineRates
) -> tuple[float, float, dict[str, str]]:
    """Return the median seconds of a step, their spread, and what else there is to say of it."""
    is_cuda = training.device.type == "cuda"
    operations = training.operations(batch)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(training.device)
    seconds, spread = middle_and_spread(step_seconds(lambda: training.step(batch), training.device, num_steps))
    at_rate = operations / 1e12 / rates.matrix_tflops
    figures = {
        "operations": f"{operations / 1e12:.4g} TFLOP",
        "these at the rate of matrix products": f"{at_rate:.3g} s",
        "step against that": f"{seconds / at_rate:.3g}",
    }
    if is_cuda:
        figures["peak memory"] = f"{torch.cuda.max_memory_allocated(training.device) / _GIB:.1f} GiB"
    return seconds, spread, figures
