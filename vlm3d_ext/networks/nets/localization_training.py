"""Training of the localizer: masks on crops, denoising on the whole scan.

Shape letters: B batch, K crops of a scan, L diseases.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .lesion_localization import LesionLocalizationModule, PlainLocalizer

__all__ = ["LocalizationTraining"]


class LocalizationTraining(nn.Module):
    """Runs a localizer on crops (training) or whole scans (validation) and computes its losses.

    Args:
        network: the localizer.
        loss: of logits (B, L, d, h, w) against targets of 1, 0 and 255 (unknown); see
            `vlm3d_ext.losses.PartialDiceCrossEntropy`.
        train_encoder: whether the encoder's trunk learns too; what gathers its regions, and its mask token, are not
            used here and stay as they are.
    """

    def __init__(
        self, network: LesionLocalizationModule | PlainLocalizer, loss: nn.Module, train_encoder: bool = False
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.train_encoder = train_encoder
        if isinstance(network, LesionLocalizationModule):
            encoder = network.encoder
            encoder.requires_grad_(train_encoder)
            # nothing reaches these, and data-parallel training waits for the gradient of each trainable weight
            encoder.mask_token.requires_grad_(False)
            for unused in (
                encoder.region_classifier,
                encoder.region_attention,
                encoder.region_norm,
                encoder.structure_encoder,
            ):
                unused.requires_grad_(False)

    def train(self, mode: bool = True) -> LocalizationTraining:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.train_encoder and isinstance(self.network, LesionLocalizationModule):
            self.network.encoder.eval()
        return self

    def forward(
        self,
        image: Tensor,
        target: Tensor,
        spacing_mm: Tensor | None = None,
        valid_size: Tensor | None = None,
        crop_start: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return ``logits``, ``probabilities``, ``target`` and ``"losses": {"masks", "denoising"}``.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            target: (B, K, L, ...) of crops, or (B, L, d, h, w) without crops; uint8, 255 is unknown.
            spacing_mm: (B, 3) [z, y, x], or None.
            valid_size: (B, 3), or None.
            crop_start: (B, K, 3) first voxel of each crop, multiples of the patch; None draws whole scans.
        """
        crop_size = target.shape[3:] if crop_start is not None else None
        drawn = self.network.logits_and_denoising(image, spacing_mm, valid_size, crop_start, crop_size)
        return self.compare(*drawn, target, crop_start)

    def compare(
        self, logits: Tensor, denoising: Tensor | None, target: Tensor, crop_start: Tensor | None = None
    ) -> dict[str, Any]:
        """Return what `forward` does, of what the network has drawn.

        Args:
            logits: (B, L, d, h, w), or (B · K, L, ...) of crops.
            denoising: loss of stage 2, None where no noise was put.
            target: as in `forward`.
            crop_start: as in `forward`.
        """
        if crop_start is not None:
            target = target.flatten(0, 1)
        masks = self.loss(logits, target)
        # without noise there is nothing to undo; the sum must have its name all the same
        losses = {"masks": masks, "denoising": denoising if denoising is not None else masks.new_zeros(())}
        return {"logits": logits, "probabilities": logits.float().sigmoid(), "target": target, "losses": losses}
