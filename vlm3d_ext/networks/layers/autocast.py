"""Whether matrix products are computed in half precision at this moment."""

from __future__ import annotations

import torch

__all__ = ["autocast_dtype"]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast computes on the device, or None where it is not enabled."""
    kind = device.type
    # the meta device has no autocast, and asking whether it is enabled is an error
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
