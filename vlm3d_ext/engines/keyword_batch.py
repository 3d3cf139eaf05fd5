"""From a batch to the arguments of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch

from ..transforms.grey_levels import INTENSITY_DRAWS, network_image

__all__ = ["PrepareKeywordBatch"]


class PrepareKeywordBatch(PrepareBatch):
    """Passes ``image`` to the network, and every other tensor of the batch as a keyword argument of the same name.

    An image of grey levels becomes numbers in [0, 1] on the device, changed by what was drawn for it
    (`vlm3d_ext.transforms.grey_levels`). What `keys` names need not be a tensor: texts are passed on as they are.

    Args:
        keys: the entries to pass on; None passes all tensors but ``image`` and those in `exclude`.
        exclude: entries the network does not take.
        image_key: the entry that stands in the first place, where it is not ``image``.
        optional_keys: with `keys`, further entries that are passed on where the batch has them.
    """

    def __init__(
        self,
        keys: Sequence[str] | None = None,
        exclude: Sequence[str] = ("labels",),
        image_key: str = "image",
        optional_keys: Sequence[str] = (),
    ) -> None:
        self.keys = keys
        self.exclude = frozenset(exclude) | {image_key, *INTENSITY_DRAWS}
        self.image_key = image_key
        self.optional_keys = tuple(optional_keys)

    def __call__(
        self,
        batchdata: dict[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, tuple, dict[str, Any]]:
        """Return image, no target, no positional and the keyword arguments, all on `device`."""
        names = self.keys
        if names is None:
            names = [k for k, v in batchdata.items() if isinstance(v, torch.Tensor) and k not in self.exclude]
        else:
            names = [*names, *(name for name in self.optional_keys if name in batchdata)]
        moved = {
            name: value.to(device, non_blocking=non_blocking, **kwargs) if isinstance(value, torch.Tensor) else value
            for name, value in ((name, batchdata[name]) for name in names)
        }
        if self.image_key == "image":
            image = network_image(batchdata, device, non_blocking)
            image = image.to(**kwargs) if kwargs else image
        else:
            image = batchdata[self.image_key].to(device, non_blocking=non_blocking, **kwargs)
        return image, None, (), moved
