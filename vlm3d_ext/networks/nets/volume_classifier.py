"""From a CT volume to findings: the encoder and the classifier together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..heads import MultiLabelClassifier
from .three_d_vision_encoder import ThreeDVisionEncoder

__all__ = ["FindingProbabilities", "VolumeClassifier"]


class VolumeClassifier(nn.Module):
    """`ThreeDVisionEncoder` and `MultiLabelClassifier`, whose state dict is what a classification checkpoint holds.

    Args:
        encoder: the vision encoder.
        classifier: the head; its `hidden_size` is the encoder's.
    """

    def __init__(self, encoder: ThreeDVisionEncoder, classifier: MultiLabelClassifier) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier

    def features(
        self,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
    ) -> Tensor:
        """Return (B, 1 + R, C), the global feature and then the regions; arguments as `ThreeDVisionEncoder.forward`."""
        features = self.encoder(
            image, anatomical_mask=anatomical_mask, spacing_mm=spacing_mm, use_anatomical_mask=use_anatomical_mask
        )
        return torch.cat([features.global_features[:, None], features.region_features], dim=1)

    def forward(
        self,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return ``logits``, ``probabilities`` and ``predictions``, each (B, L); see `MultiLabelClassifier.forward`.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            anatomical_mask: (B, d, h, w) integers 0 to R, or None.
            spacing_mm: (B, 3) [z, y, x], or None.
            use_anatomical_mask: (B,) bool; None uses every mask given.
        """
        return self.classifier(self.features(image, anatomical_mask, spacing_mm, use_anatomical_mask))


class FindingProbabilities(VolumeClassifier):
    """`VolumeClassifier` for export: one image in, calibrated probabilities out, the same weights under the same
    names. The text embeddings are among the weights, so no text encoder is needed."""

    def forward(self, image: Tensor) -> Tensor:  # type: ignore[override]
        """Return probabilities (B, L).

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], of the encoder's `reference_spacing_mm`.
        """
        return super().forward(image)["probabilities"]
