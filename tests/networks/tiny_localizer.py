"""A localizer of a few thousand weights, with texts that mean something and gates that hear them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlm3d_ext.networks.blocks import DenoisingTransformer, TextEmbedder, TextGuidedAttentionUNet
from vlm3d_ext.networks.nets import LesionLocalizationModule, ThreeDVisionEncoder

PATCH = (2, 4, 4)
HIDDEN = 24
DISEASES = 5


def tiny_stages(max_noise: float = 0.0, disease_set: str = "chest_ct_5", **unet: Any) -> dict[str, nn.Module]:
    """Return the encoder and the three stages, seeded, as arguments of `LesionLocalizationModule`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "num_heads": 4, "num_depth_heads": 1, "mlp_dim": 32}
    options: dict[str, Any] = {
        "stem_channels": 4,
        "stem_stride": (1, 2, 2),
        "base_channels": 8,
        "level_strides": ((2, 2, 2), (2, 2, 2)),
        "head_channels": 4,
        **unet,
    }
    stages: dict[str, nn.Module] = {
        "encoder": ThreeDVisionEncoder(patch_size=PATCH, num_layers=1, **sizes),
        "text_embedder": TextEmbedder(disease_set, text_hidden_size=16, hidden_size=HIDDEN),
        "denoising_transformer": DenoisingTransformer(num_layers=2, max_noise=max_noise, **sizes),
        "unet": TextGuidedAttentionUNet(
            token_channels=HIDDEN, text_channels=HIDDEN, patch_size=PATCH, **options
        ),
    }  # fmt: skip
    stages["text_embedder"].embeddings.normal_()
    for name, parameter in stages["unet"].named_parameters():
        if "coefficients" in name:  # they begin at zero, with which a gate hears nothing
            nn.init.normal_(parameter, std=0.5)
    _measure_statistics(stages["unet"])
    return stages


def _measure_statistics(unet: nn.Module) -> None:
    """Set the running statistics to those of noise: with untrained ones the features fade away from level to level, and
    what should change a mask would be hidden behind the head's bias."""
    norms = [module for module in unet.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.momentum = 1.0
    image, tokens = torch.rand(2, 1, 16, 32, 32), torch.randn(2, 8, 8, 8, HIDDEN)
    with torch.no_grad():
        unet.train()(image, tokens, torch.randn(DISEASES, HIDDEN))
    for norm in norms:
        norm.momentum = 0.1


def tiny_localizer(network: type = LesionLocalizationModule, max_noise: float = 0.0, **options: Any) -> Any:
    """Return a seeded localizer in evaluation mode; other options are those of `LesionLocalizationModule`."""
    return network(**tiny_stages(max_noise), **options).eval()
