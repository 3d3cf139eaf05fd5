"""A bundle's training as its configs have it, without its data: network, loss, optimizer, and one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch.utils.flop_counter import FlopCounterMode

from .repository import BUNDLES
from .row import ResultsDiffer

__all__ = ["ShippedTraining"]

# bfloat16 has eight bits of mantissa, and losses are means over thousands of products
_LOSS_TOLERANCE = 0.05


class ShippedTraining:
    """Network, loss and optimizer of a bundle's configs, built on a device.

    Args:
        bundle: its name.
        device: where.
        files: of its configs, in order.
        changes: items of the config that are replaced, ids such as ``"trainable::loss"`` among them.

    Attributes:
        parser: of the whole config.
        network: what the trainer trains.
    """

    def __init__(
        self,
        bundle: str,
        device: str | torch.device,
        files: Sequence[str] = ("train.json",),
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.parser = ConfigParser()
        self.parser.read_config([str(BUNDLES / bundle / "configs" / name) for name in files])
        self.parser.update({"device": f"$torch.device('{device}')", **(changes or {})})
        # as the configs' initialize does; it also decides which convolutions are taken
        set_determinism(self.knob("seed"))
        self.network: torch.nn.Module = self.parser.get_parsed_content("network").train()
        self._loss = self.parser.get_parsed_content("loss")
        self.optimizer: torch.optim.Optimizer = self.parser.get_parsed_content("optimizer")
        self._trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def knob(self, name: str) -> Any:
        """Return a value of the config, computed if it is an expression."""
        return self.parser.get_parsed_content(name)

    def step(self, batch: Mapping[str, Any]) -> None:
        """Train on a batch in bfloat16, as the trainers do, who look at the gradients' norm and thus wait."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()
        float(torch.nn.utils.clip_grad_norm_(self._trained, self.knob("max_grad_norm")))
        self.optimizer.step()

    def loss(self, batch: Mapping[str, Any], half: bool = True) -> torch.Tensor:
        """Return the loss of a batch, in bfloat16 or in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            loss: torch.Tensor = self._loss(self.network(**batch), None)
        return loss

    def operations(self, batch: Mapping[str, Any]) -> int:
        """Return the operations of a step, what checkpointing computes again included."""
        with FlopCounterMode(display=False) as counter:
            self.step(batch)
        return counter.get_total_flops()

    @torch.no_grad()
    def check_precision(self, batch: Mapping[str, Any]) -> str:
        """Compare the losses of a batch in bfloat16 and float32, without random parts; return what was found.

        Raises:
            ResultsDiffer: if they do not agree.
        """
        self.network.eval()
        half, whole = (float(self.loss(batch, half)) for half in (True, False))
        self.network.train()
        if not abs(half - whole) <= _LOSS_TOLERANCE * abs(whole):
            raise ResultsDiffer(f"the loss is {half:.4g} in bfloat16 and {whole:.4g} in float32")
        return f"the first case's loss is {half:.4g} in bfloat16 and {whole:.4g} in float32"
