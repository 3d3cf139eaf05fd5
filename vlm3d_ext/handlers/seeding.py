"""Make what a network draws at random depend on the iteration only, so that a resumed run draws the same."""

from __future__ import annotations

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

__all__ = ["IterationSeed"]


class IterationSeed:
    """Seeds torch before every iteration with ``(seed + iteration) * world size + rank``; with one process, ``seed +
    iteration``.

    Dropout and other draws inside the network then do not depend on what came before in this process. For a resumed
    run the trainer's ``state.iteration`` must have been restored. Ranks draw differently, because they hold
    different samples.

    Args:
        seed: any integer of at least 0.

    Raises:
        ValueError: if the seed is negative.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}.")
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the CPU's and every GPU's generator."""
        torch.manual_seed((self.seed + engine.state.iteration) * idist.get_world_size() + idist.get_rank())
