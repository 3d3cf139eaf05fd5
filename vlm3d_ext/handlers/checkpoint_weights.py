"""Loading weights when a run starts, with errors that say what to do."""

from __future__ import annotations

from ignite.engine import Engine, Events

from ..checkpoint_files import UpstreamCheckpoint

__all__ = ["CheckpointWeights"]


class CheckpointWeights(UpstreamCheckpoint):
    """An `UpstreamCheckpoint` that is loaded when the engine starts."""

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Check, and load; see `UpstreamCheckpoint.load` for the errors."""
        self.load(engine.logger)
