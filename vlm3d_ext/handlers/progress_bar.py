"""Progress of an engine on the terminal, or one line per epoch where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

__all__ = ["ProgressBar"]


class ProgressBar:
    """On a terminal, a bar per epoch; elsewhere (a log file, a cluster job), one line per epoch. Only rank 0 writes.

    Both show the mean loss so far, if the engine's output has one.

    Args:
        name: what the line begins with, e.g. ``"train"``; by default ``"epoch"`` for several epochs and
            ``"iterations"`` for one.
        loss: key of the loss in the engine's output.
        stream: where to write; standard error by default.
        every: without a terminal, write a line every so many epochs, and after the last one.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(
        self, name: str | None = None, loss: str = "loss", stream: TextIO | None = None, every: int = 1
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}.")
        self.name = name
        self.loss = loss
        self.stream = stream
        self.every = every
        self._bar: tqdm | None = None
        self._sum: float | torch.Tensor = 0.0
        self._count = 0
        self._iterations = 0
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to any engine; on ranks other than 0 nothing happens."""
        if idist.get_rank() > 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._sum, self._count, self._iterations, self._started = 0.0, 0, 0, time.monotonic()
        stream = self.stream or sys.stderr
        if stream.isatty():
            self._bar = tqdm(total=engine.state.epoch_length, desc=self._title(engine), file=stream, leave=False)

    def _advance(self, engine: Engine) -> None:
        self._iterations += 1
        loss = _loss_of(engine.state.output, self.loss)
        if loss is not None:
            self._sum = self._sum + loss
            self._count += 1
        if self._bar is not None:
            if self._count:
                self._bar.set_postfix_str(self._mean_loss(), refresh=False)
            self._bar.update()

    def _finish(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        epoch, last = engine.state.epoch, engine.state.max_epochs
        stream = self.stream or sys.stderr
        if not stream.isatty() and epoch % self.every and epoch != last:
            return
        parts = [f"{self._title(engine)}: {self._iterations} iterations in {time.monotonic() - self._started:.1f} s"]
        if self._count:
            parts.append(self._mean_loss())
        print(", ".join(parts), file=stream, flush=True)

    def _mean_loss(self) -> str:
        return f"{self.loss} {float(self._sum) / self._count:.4g}"

    def _title(self, engine: Engine) -> str:
        several = (engine.state.max_epochs or 1) > 1
        name = self.name or ("epoch" if several else "iterations")
        return f"{name} {engine.state.epoch}/{engine.state.max_epochs}" if several else name


def _loss_of(output: Any, key: str) -> float | torch.Tensor | None:
    """The loss in an engine's output: a dictionary, or the list of dictionaries into which MONAI decollates a batch.

    A tensor stays one, because reading its value would make the CPU wait for the GPU in every iteration.
    """
    if isinstance(output, list):
        output = output[0] if output else None
    value = output.get(key) if isinstance(output, dict) else None
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().double().squeeze()
    return float(value) if isinstance(value, (int, float)) else None
