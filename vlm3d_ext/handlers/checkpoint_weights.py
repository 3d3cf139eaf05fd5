"""Loading weights when a run starts, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ignite.engine import Engine, Events
from torch import nn

from ..lineage import load_upstream_weights

__all__ = ["CheckpointWeights"]


class CheckpointWeights:
    """Loads modules from one checkpoint when the engine starts; see `load_upstream_weights` for what can be wrong.

    Args:
        checkpoint: the file.
        objects: key in the checkpoint -> module.
        parameter_name: the config key that points to the file, for the error message.
        command: the command that makes the file, for the error message.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        objects: Mapping[str, nn.Module],
        parameter_name: str = "ckpt_path",
        command: str = "python -m monai.bundle run --config_file bundles/encoder/configs/train.json",
    ) -> None:
        self.checkpoint = checkpoint
        self.objects = dict(objects)
        self.parameter_name = parameter_name
        self.command = command

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load."""
        for key, module in self.objects.items():
            load_upstream_weights(
                module, self.checkpoint, key=key, parameter_name=self.parameter_name, command=self.command
            )
        engine.logger.info(f"Weights of {', '.join(self.objects)} from {self.checkpoint}.")
