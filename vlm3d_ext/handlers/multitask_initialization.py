"""Where joint training begins: at four checkpoints of one encoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events

from ..checkpoint_files import CheckpointError, UpstreamCheckpoint, checkpoint_entry
from ..networks.nets import VLM3DMultiTask

__all__ = ["MultiTaskInitialization"]

PARTS = ("encoder", "classification", "localization", "report_generation")
_WITH_ENCODER = ("classification", "localization")


class MultiTaskInitialization:
    """Loads the four bundles' checkpoints into `VLM3DMultiTask` when training starts.

    The classifier's and the localizer's checkpoints hold the encoder that they were trained on. It has to be the very
    one in the encoder's checkpoint, tensor by tensor: a head on another encoder is worth nothing.

    Args:
        network: to be filled.
        checkpoints: each of `PARTS` -> path.
        checks: part -> key in its checkpoint -> object whose `load_state_dict` refuses what does not belong here.
    """

    def __init__(
        self,
        network: VLM3DMultiTask,
        checkpoints: Mapping[str, str | os.PathLike],
        checks: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.checkpoints = dict(checkpoints)
        self.weights = {
            part: UpstreamCheckpoint(
                self.checkpoints[part],
                {"model": getattr(network, part)},
                parameter_name=f"{part}_ckpt",
                command=f"python -m monai.bundle run --config_file bundles/{part}/configs/train.json",
                checks=(checks or {}).get(part),
            )
            for part in PARTS
        }

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Load; see `load`."""
        self.load(engine.logger)

    def check_file(self) -> None:
        """Refuse a missing file at once.

        Raises:
            FileNotFoundError: if there is one.
        """
        for weights in self.weights.values():
            weights.check_file()

    def check_encoders(self) -> None:
        """Refuse a head that was trained on another encoder, before hours are spent on what it says of the scans.

        Raises:
            CheckpointError: if there is one.
        """
        for part in _WITH_ENCODER:
            self._check_encoder(part)

    def load(self, logger: logging.Logger) -> None:
        """Compare the encoders, and load.

        Raises:
            FileNotFoundError: if a checkpoint does not exist.
            CheckpointError: if one does not fit, or a head was trained on another encoder.
            ValueError: if one of the checks refuses it.
        """
        # the encoder that a head brings along replaces the one that is there, so they are compared before
        self.check_encoders()
        for part in PARTS:
            self.weights[part].load(logger)

    def _check_encoder(self, part: str) -> None:
        own, path = self.checkpoints["encoder"], self.checkpoints[part]
        expected = checkpoint_entry(own, "model", parameter_name="encoder_ckpt")
        found = {
            name.removeprefix("encoder."): value
            for name, value in checkpoint_entry(path, "model", parameter_name=f"{part}_ckpt").items()
            if name.startswith("encoder.")
        }
        differing = [
            name for name, value in expected.items() if name not in found or not torch.equal(found[name], value)
        ]
        if differing:
            raise CheckpointError(
                f"{path}: its encoder is not the one in {own}: {len(differing)} of {len(expected)} tensors differ, "
                f"{differing[0]} first. Joint training begins from one encoder: train {part} on this encoder with "
                f"--train_encoder False, or name the checkpoints that belong together with --encoder_ckpt and "
                f"--{part}_ckpt."
            )
