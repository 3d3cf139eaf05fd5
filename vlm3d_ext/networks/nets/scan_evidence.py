"""What the encoder, the classifier and the localizer say about a scan, in one pass.

Shape letters: B batch; d, h, w voxels; D, H, W tokens; V channels; F findings; L diseases.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d

from ..blocks import DenoisingTransformer, TextEmbedder, TextGuidedAttentionUNet
from ..heads import MultiLabelClassifier
from .lesion_localization import LesionLocalizationModule
from .three_d_vision_encoder import ThreeDVisionEncoder, TokenFeatures
from .volume_classifier import VolumeClassifier

__all__ = [
    "Evidence",
    "ScanEvidence",
    "have_equal_weights",
    "pool_in_plane",
    "predicted_regions",
    "scan_evidence_network",
]


@dataclass(frozen=True)
class Evidence:
    """The evidence on a batch of scans.

    Attributes:
        global_features: (B, V).
        region_features: (B, R, V).
        local_features: (B, D, H', W', V), pooled in-plane.
        probabilities: (B, F) of the findings, calibrated.
        predictions: (B, F) bool.
        lesion_probabilities: (B, L, d, h, w), or None without a localizer.
        regions: (B, d, h, w) uint8, the anatomical region of each voxel: the mask's where it is used, otherwise the
            encoder's prediction.
    """

    global_features: Tensor
    region_features: Tensor
    local_features: Tensor
    probabilities: Tensor
    predictions: Tensor
    lesion_probabilities: Tensor | None
    regions: Tensor


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules of one architecture hold the same weights to the last digit."""
    others = other.state_dict()
    return all(torch.equal(weight, others[name]) for name, weight in one.state_dict().items())


def pool_in_plane(local_features: Tensor, size: int) -> Tensor:
    """Average features over `size` × `size` neighbours within each slab; (B, D, H, W, V) to (B, D, ceil(H / size),
    ceil(W / size), V). At the border the mean is over the tokens that are there."""
    if size == 1:
        return local_features
    channels_first = local_features.movedim(-1, 1)
    # a slab smaller than a square is one square; avg_pool3d would refuse it
    square = (1, min(size, channels_first.shape[3]), min(size, channels_first.shape[4]))
    pooled = avg_pool3d(channels_first, square, stride=square, ceil_mode=True, count_include_pad=False)
    return pooled.movedim(1, -1)


def predicted_regions(bin_region_logits: Tensor, image: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Return the most probable anatomical region of each voxel, (B, d, h, w) uint8, without a mask.

    The encoder says for each token to which region its voxels of an intensity belong; a voxel takes the answer for its
    own intensity in the first channel.

    Args:
        bin_region_logits: (B, N, in_channels, 1 + R, K) of `VisionFeatures`.
        image: (B, in_channels, d, h, w) in [0, 1].
        patch_size: voxels of a token.
    """
    size = image.shape[2:]
    grid = [-(-n // p) for n, p in zip(size, patch_size, strict=True)]
    table = bin_region_logits[:, :, 0].argmax(2).to(torch.uint8).unflatten(1, grid)  # (B, D, H, W, K)
    num_bins = table.shape[-1]
    for axis, patch in enumerate(patch_size):
        table = table.repeat_interleave(patch, axis + 1).narrow(axis + 1, 0, size[axis])
    bins = (image[:, 0] * num_bins).long().clamp_(0, num_bins - 1)
    return table.gather(-1, bins[..., None])[..., 0]


class ScanEvidence(nn.Module):
    """Runs the three networks of the upstream bundles, frozen.

    Each has an encoder in its checkpoint. Where a head was trained on the frozen encoder, the two are the same, and the
    encoder is run once for both; weights are compared at each call, which takes a small part of what a run would.

    Args:
        encoder: the vision encoder.
        classifier: with an encoder of its own, as its checkpoint has it.
        localizer: likewise; None draws no lesions.
        pooling: side of the in-plane squares over which local features are averaged.
    """

    def __init__(
        self,
        encoder: ThreeDVisionEncoder,
        classifier: VolumeClassifier,
        localizer: LesionLocalizationModule | None = None,
        pooling: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier
        self.localizer = localizer
        self.pooling = pooling
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> ScanEvidence:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        image: Tensor,
        anatomical_mask: Tensor | None = None,
        spacing_mm: Tensor | None = None,
        use_anatomical_mask: Tensor | None = None,
    ) -> Evidence:
        """Return the evidence on scans of one size.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1].
            anatomical_mask: (B, d, h, w) integers 0 to R, or None.
            spacing_mm: (B, 3) [z, y, x], or None.
            use_anatomical_mask: (B,) bool; None uses every mask given.
        """
        tokens = self.encoder.encode_tokens(image, spacing_mm)
        features = self.encoder.gather_regions(tokens, image, anatomical_mask, use_anatomical_mask)
        if have_equal_weights(self.classifier.encoder, self.encoder):
            summary = torch.cat([features.global_features[:, None], features.region_features], dim=1)
            found = self.classifier.classifier(summary)
        else:
            found = self.classifier(image, anatomical_mask, spacing_mm, use_anatomical_mask)
        grid = [-(-n // p) for n, p in zip(image.shape[2:], self.encoder.patch_size, strict=True)]
        regions = predicted_regions(features.bin_region_logits, image, self.encoder.patch_size)
        if anatomical_mask is not None:
            used = anatomical_mask.to(torch.uint8)
            guided = use_anatomical_mask
            regions = used if guided is None else torch.where(guided.view(-1, 1, 1, 1), used, regions)
        return Evidence(
            features.global_features,
            features.region_features,
            pool_in_plane(features.local_features.unflatten(1, grid), self.pooling),
            found["probabilities"],
            found["predictions"].bool(),
            self._lesion_probabilities(image, spacing_mm, tokens),
            regions,
        )

    def _lesion_probabilities(self, image: Tensor, spacing_mm: Tensor | None, tokens: TokenFeatures) -> Tensor | None:
        if self.localizer is None:
            return None
        if not have_equal_weights(self.localizer.encoder, self.encoder):
            return self.localizer(image, spacing_mm)["probabilities"]
        local = self.localizer.local_features_of_tokens(tokens, image)
        return self.localizer.draw_from_tokens(image, local)[0].float().sigmoid()


def scan_evidence_network(
    *,
    label_set: str,
    disease_set: str,
    pooling: int,
    in_channels: int,
    patch_size: Sequence[int],
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_depth_heads: int,
    mlp_dim: int,
    text_hidden_size: int,
    projection_dim: int,
    num_soft_tokens: int,
    use_region_features: bool,
    denoising_layers: int,
    denoising_mlp_dim: int,
    stem_channels: int,
    stem_stride: Sequence[int],
    base_channels: int,
    level_strides: Sequence[Sequence[int]],
    head_channels: int,
    dropout: float = 0.0,
    max_noise: float = 0.0,
    activation_checkpointing: str = "none",
) -> ScanEvidence:
    """Return the three networks as the configs of their bundles build them; arguments are those configs' knobs. The
    last three matter in training only."""
    encoder = ThreeDVisionEncoder(
        in_channels,
        patch_size,
        hidden_size,
        num_layers,
        num_heads,
        num_depth_heads,
        mlp_dim,
        activation_checkpointing=activation_checkpointing,
    )
    classifier = MultiLabelClassifier(
        label_set=label_set,
        hidden_size=hidden_size,
        text_hidden_size=text_hidden_size,
        projection_dim=projection_dim,
        num_soft_tokens=num_soft_tokens,
        use_region_features=use_region_features,
        dropout=dropout,
    )
    localizer = LesionLocalizationModule(
        copy.deepcopy(encoder),
        TextEmbedder(disease_set=disease_set, text_hidden_size=text_hidden_size, hidden_size=hidden_size),
        DenoisingTransformer(
            hidden_size=hidden_size,
            num_layers=denoising_layers,
            num_heads=num_heads,
            num_depth_heads=num_depth_heads,
            mlp_dim=denoising_mlp_dim,
            max_noise=max_noise,
            activation_checkpointing=activation_checkpointing,
        ),
        TextGuidedAttentionUNet(
            in_channels=in_channels,
            token_channels=hidden_size,
            text_channels=hidden_size,
            patch_size=patch_size,
            stem_channels=stem_channels,
            stem_stride=stem_stride,
            base_channels=base_channels,
            level_strides=level_strides,
            head_channels=head_channels,
        ),
    )
    return ScanEvidence(encoder, VolumeClassifier(copy.deepcopy(encoder), classifier), localizer, pooling)
