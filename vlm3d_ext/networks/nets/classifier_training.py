"""The classifier with what only its training needs: the text encoder and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.prompted_text_encoder import PromptedTextEncoder
from .volume_classifier import VolumeClassifier

__all__ = ["ClassifierTraining", "FeatureClassifierTraining"]


class ClassifierTraining(nn.Module):
    """Trains `VolumeClassifier` on volumes.

    While training, the findings' text embeddings are computed anew in each step, so that gradients reach the soft
    prompts and the text projector. In evaluation mode they are computed once per state of the weights, into the
    classifier's buffer.

    Args:
        network: what the checkpoint will hold.
        text_encoder: frozen; its weights are in no state dict.
        loss: of logits (B, L) and labels (B, L), such as `vlm3d_ext.losses.WeightedBinaryCrossEntropy`.
        train_encoder: whether the encoder is fine-tuned, but for its mask token and region classifier, which learn
            in pre-training only; frozen, it also stays in evaluation mode.
        mixup_alpha: while training, cases are mixed in pairs, features and labels alike, with a share drawn from
            Beta(alpha, alpha) (manifold mixup, Verma et al., ICML 2019, equation 1). It holds back overfitting where
            cases are few; a mixed label is unknown where one of both is. 0 mixes nothing.

    Raises:
        ValueError: if `mixup_alpha` is negative.
    """

    def __init__(
        self,
        network: VolumeClassifier,
        text_encoder: PromptedTextEncoder,
        loss: Callable[[Tensor, Tensor], Tensor],
        train_encoder: bool = False,
        mixup_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if mixup_alpha < 0:
            raise ValueError(f"mixup_alpha must be at least 0, got {mixup_alpha}.")
        self.mixup_alpha = mixup_alpha
        self.network = network
        self.text_encoder = text_encoder
        self.loss = loss
        self.train_encoder = train_encoder
        encoder = self.network.encoder
        encoder.requires_grad_(train_encoder)
        # only pre-training reaches these, and data-parallel training waits for the gradient of each trainable weight
        encoder.mask_token.requires_grad_(False)
        encoder.region_classifier.requires_grad_(False)
        self._cached_state: list[int] | None = None

    def train(self, mode: bool = True) -> ClassifierTraining:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if not self.train_encoder:
            self.network.encoder.eval()
        return self

    def forward(
        self,
        image: Tensor,
        labels: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return what `MultiLabelClassifier.forward` does, ``"losses": {"classification": scalar}`` and ``"labels"``.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            labels: (B, L) of 1, 0 or NaN.
            anatomical_mask: (B, d, h, w) integers 0 to R, or None.
            spacing_mm: (B, 3) [z, y, x], or None.
            use_anatomical_mask: (B,) bool; None uses every mask given.
        """
        return self.classify(self.features(image, anatomical_mask, spacing_mm, use_anatomical_mask), labels)

    def features(self, image: Tensor, *arguments: Tensor | None, **keywords: Tensor | None) -> Tensor:
        """Return what the classifier sees of the images, (B, 1 + R, C); see `VolumeClassifier.features`."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            return self.network.features(image, *arguments, **keywords)

    def classify(self, features: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return what `forward` does, of features (B, 1 + R, C) and labels (B, L) of 1, 0 or NaN."""
        classifier = self.network.classifier
        if self.training:
            if self.mixup_alpha > 0:
                features, labels = self._mix(features, labels)
            output = classifier(features, classifier.embed_own_findings(self.text_encoder)[0])
        else:
            self.refresh_text_embeddings()
            output = classifier(features)
        return {**output, "labels": labels, "losses": {"classification": self.loss(output["logits"], labels)}}

    def _mix(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        partner = torch.randperm(len(features), device=features.device)
        alpha = torch.full((len(features), 1), self.mixup_alpha, device=features.device)
        share = torch.distributions.Beta(alpha, alpha).sample()
        mixed = share[..., None] * features + (1 - share[..., None]) * features[partner]
        return mixed, share * labels + (1 - share) * labels[partner]  # NaN plus anything is NaN

    def refresh_text_embeddings(self) -> None:
        """Compute the cached text embeddings, unless they are of the weights as they are now."""
        classifier = self.network.classifier
        # every change in place counts a tensor's version up: an optimizer's step, a checkpoint that is loaded
        weights = (classifier.soft_prompts, classifier.text_projector.weight, classifier.text_projector.bias)
        state = [weight._version for weight in weights]
        if state != self._cached_state:
            classifier.cache_text_embeddings(self.text_encoder)
            self._cached_state = state


class FeatureClassifierTraining(ClassifierTraining):
    """Trains the classifier on features that the encoder bundle's inference has extracted; the encoder is not run."""

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Any]:  # type: ignore[override]
        """Return what `ClassifierTraining.forward` does, for features (B, 1 + R, C) and labels (B, L)."""
        return self.classify(features, labels)

    def features(self, image: Tensor, *arguments: Tensor | None, **keywords: Tensor | None) -> Tensor:
        """Return what is given in the image's place, which are the features already."""
        return image
