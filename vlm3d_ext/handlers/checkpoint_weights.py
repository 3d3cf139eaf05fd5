"""Loading weights when a run starts, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import nn

from ..checkpoint_files import CheckpointError, load_upstream_weights, read_checkpoint

__all__ = ["CheckpointWeights"]


class CheckpointWeights:
    """Loads modules from one checkpoint when the engine starts; see `load_upstream_weights` for what can be wrong.

    Args:
        checkpoint: the file.
        objects: key in the checkpoint -> module.
        parameter_name: the config key that points to the file, for the error message.
        command: the command that makes the file, for the error message.
        checks: key in the checkpoint -> object whose `load_state_dict` refuses what does not belong together, such as
            `vlm3d_ext.text.label_record.LabelRecord`; asked before any weight is loaded.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        objects: Mapping[str, nn.Module],
        parameter_name: str = "ckpt_path",
        command: str = "python -m monai.bundle run --config_file bundles/encoder/configs/train.json",
        checks: Mapping[str, Any] | None = None,
    ) -> None:
        self.checks = dict(checks or {})
        self.checkpoint = checkpoint
        self.objects = dict(objects)
        self.parameter_name = parameter_name
        self.command = command

    @property
    def _hint(self) -> str:
        return f"Make it with: {self.command}, or point to another file with --{self.parameter_name} PATH."

    def check_file(self) -> None:
        """Refuse a missing file at once, before data are read and the file's fingerprint is asked for.

        Raises:
            FileNotFoundError: if there is no such file.
        """
        if not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"checkpoint {self.checkpoint} does not exist. {self._hint}")

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Check, and load.

        Raises:
            FileNotFoundError: if there is no such file.
            CheckpointError: if the file or its weights do not fit.
            ValueError: if one of the checks refuses it.
        """
        content = read_checkpoint(self.checkpoint, hint=self._hint) if self.checks else {}
        for key, check in self.checks.items():
            if key not in content:
                raise CheckpointError(f"{self.checkpoint} has no entry {key!r}; it has {sorted(content)}. {self._hint}")
            try:
                check.load_state_dict(content[key])
            except ValueError as error:
                raise ValueError(f"{self.checkpoint}: {error}") from None
        for key, module in self.objects.items():
            load_upstream_weights(
                module, self.checkpoint, key=key, parameter_name=self.parameter_name, command=self.command
            )
        engine.logger.info(f"Weights of {', '.join(self.objects)} from {self.checkpoint}.")
