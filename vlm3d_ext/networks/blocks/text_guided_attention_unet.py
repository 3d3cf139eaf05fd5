"""Stage 3 of the localizer: a U-Net that draws every disease in one pass.

Shape letters: B batch; C channels; L diseases; d, h, w voxels of the image; D, H, W tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, interpolate, leaky_relu, pad

from ..layers import SynchronizedBatchNorm

__all__ = ["TextAttentionGate", "TextGuidedAttentionUNet", "TextGuidedHead"]


def _triple(numbers: Sequence[int]) -> tuple[int, int, int]:
    depth, height, width = numbers
    return depth, height, width


def _interpolated(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return (B, C, D, H, W) interpolated to another size.

    On the processor, with the channels last in memory: it then takes several voxels' channels at a time, which is three
    times as fast for the same numbers but for their rounding.
    """
    if x.device.type != "cpu":
        return interpolate(x, size=_triple(size), mode="trilinear")
    fine = interpolate(x.contiguous(memory_format=torch.channels_last_3d), size=_triple(size), mode="trilinear")
    return fine.contiguous()


class _Convolution(nn.Sequential):
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Sequence[int], stride: Sequence[int] = (1, 1, 1)
    ) -> None:
        padding = _triple([k // 2 for k in kernel_size])
        super().__init__(
            nn.Conv3d(in_channels, out_channels, _triple(kernel_size), _triple(stride), padding),
            SynchronizedBatchNorm(out_channels),
            nn.LeakyReLU(0.01),
        )


class TextAttentionGate(nn.Module):
    """Lets through of a skip connection what the coarser level and the texts ask for.

    Each voxel of the coarser level attends to the texts (and to a null text); what it hears is added to the two terms
    of an additive attention gate. The gate has one coefficient per channel, so it also modulates the skip by the texts.
    All of it is computed at the coarser level and the coefficients are interpolated: the gate costs an eighth of what
    it would at the finer one.

    Source: additive attention gate, Oktay et al. 2018 (Attention U-Net), equations 1 and 2; with a text term, and
    coefficients in (0, 2) that begin at 1.

    Args:
        skip_channels: of the finer level.
        gate_channels: of the coarser level.
        text_channels: C of the texts.
        stride: (d, h, w) voxels of the finer level in one of the coarser.
    """

    def __init__(self, skip_channels: int, gate_channels: int, text_channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        hidden = max(8, skip_channels // 2)
        self.skip = nn.Conv3d(skip_channels, hidden, _triple(stride), _triple(stride))
        self.gate = nn.Conv3d(gate_channels, hidden, 1)
        self.query = nn.Conv3d(gate_channels, hidden, 1)
        self.text_key_value = nn.Linear(text_channels, 2 * hidden)
        self.null_key = nn.Parameter(torch.zeros(1, hidden))
        self.coefficients = nn.Conv3d(hidden, skip_channels, 1)
        for parameter in self.coefficients.parameters():
            nn.init.zeros_(parameter)

    def forward(self, skip: Tensor, gate: Tensor, texts: Tensor) -> Tensor:
        """Return the skip, weighted.

        Args:
            skip: (B, skip_channels, d, h, w).
            gate: (B, gate_channels, ...), the coarser level.
            texts: (B, L, text_channels).
        """
        key, value = self.text_key_value(texts).chunk(2, dim=-1)
        key = torch.cat([self.null_key.to(key.dtype).expand(key.shape[0], 1, -1), key], dim=1)  # (B, 1 + L, hidden)
        value = pad(value, (0, 0, 1, 0))  # the null text says nothing
        asked = self.query(gate)
        share = torch.einsum("bkc,bcdhw->bkdhw", key, asked) / math.sqrt(asked.shape[1])
        heard = torch.einsum("bkdhw,bkc->bcdhw", share.softmax(1), value)
        hidden = leaky_relu(self.skip(skip) + self.gate(gate) + heard, 0.01)
        coefficients = 2 * self.coefficients(hidden).sigmoid()
        return skip * _interpolated(coefficients, skip.shape[2:])


class TextGuidedHead(nn.Module):
    """A small voxel-wise network per disease, whose weights are made from the disease's text.

    All diseases share the features; only this head, two layers of a few channels, is run once for each. Its last layer
    gives a logit to each image voxel inside a feature voxel, so masks are as fine as the image whatever the stride.

    Source: text-driven segmentor of the CLIP-Driven Universal Model, Liu et al. 2023, section 3.2; sub-pixel
    convolution, Shi et al. 2016, equation 4.

    Args:
        in_channels: of the features.
        text_channels: C of the texts.
        stride: (d, h, w) voxels of the image in one of the features.
        head_channels: hidden channels of each disease's network.
    """

    def __init__(
        self, in_channels: int, text_channels: int, stride: Sequence[int] = (1, 1, 1), head_channels: int = 8
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.head_channels = head_channels
        self.stride = tuple(stride)
        drawn = math.prod(stride)
        self.sizes = [head_channels * in_channels, head_channels, head_channels * drawn, drawn]
        hidden, weights = nn.Linear(text_channels, text_channels), nn.Linear(text_channels, sum(self.sizes))
        nn.init.constant_(weights.bias[-drawn:], -2.0)  # most voxels are of no disease
        self.controller = nn.Sequential(hidden, nn.GELU(), weights)

    def forward(self, features: Tensor, texts: Tensor) -> Tensor:
        """Return logits (B, L, d, h, w) of features (B, in_channels, d / stride, ...) and texts (L, text_channels)."""
        num_diseases, hidden, drawn = texts.shape[0], self.head_channels, self.sizes[-1]
        first, first_bias, second, second_bias = self.controller(texts).to(features.dtype).split(self.sizes, dim=1)
        first = first.reshape(num_diseases * hidden, self.in_channels, 1, 1, 1) / math.sqrt(self.in_channels)
        x = leaky_relu(conv3d(features, first, first_bias.reshape(-1)), 0.01)
        second = second.reshape(num_diseases * drawn, hidden, 1, 1, 1) / math.sqrt(hidden)
        logits = conv3d(x, second, second_bias.reshape(-1), groups=num_diseases)
        batch, _, depth, height, width = logits.shape
        z, y, x_ = self.stride
        logits = logits.view(batch, num_diseases, z, y, x_, depth, height, width)
        return logits.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, num_diseases, depth * z, height * y, width * x_)


class TextGuidedAttentionUNet(nn.Module):
    """U-Net whose fine levels see the image, whose token level sees the refined features, and whose skips hear the
    text.

    Levels: the stem, at `stem_stride` of the image, with few channels and kernels that are flat in depth (its voxels
    are); then one level for each entry of `level_strides`, with `base_channels` · 1, 2, 4, ... channels. The level
    whose voxel is a token takes the tokens in. Logits are drawn from the stem's level for each voxel of the image
    (`TextGuidedHead`).

    Args:
        in_channels: intensity windows of the image.
        token_channels: of the refined features.
        text_channels: C of the texts.
        patch_size: (d, h, w) voxels of a token.
        stem_channels: channels of the stem.
        stem_stride: (d, h, w) voxels of the image in one of the stem.
        base_channels: channels of the first level after the stem.
        level_strides: (d, h, w) of each level against the one before it.
        head_channels: see `TextGuidedHead`.

    Raises:
        ValueError: if no level's voxel is a token.
    """

    def __init__(
        self,
        in_channels: int = 1,
        token_channels: int = 768,
        text_channels: int = 768,
        patch_size: Sequence[int] = (4, 16, 16),
        stem_channels: int = 16,
        stem_stride: Sequence[int] = (1, 2, 2),
        base_channels: int = 64,
        level_strides: Sequence[Sequence[int]] = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (2, 2, 2)),
        head_channels: int = 8,
    ) -> None:
        super().__init__()
        strides = [tuple(stem_stride), *(tuple(stride) for stride in level_strides)]
        channels = [stem_channels, *(base_channels * 2**level for level in range(len(level_strides)))]
        kernels = [(1, 3, 3)] + [(3, 3, 3)] * len(level_strides)
        voxels = [
            tuple(math.prod(stride[axis] for stride in strides[: level + 1]) for axis in range(3))
            for level in range(len(strides))
        ]
        if tuple(patch_size) not in voxels:
            raise ValueError(
                f"no level of the U-Net has the token's voxel {tuple(patch_size)}: stem_stride {tuple(stem_stride)} "
                f"and level_strides {[list(stride) for stride in level_strides]} give {voxels}; change them, or "
                f"patch_size."
            )
        self.token_level = voxels.index(tuple(patch_size))
        self.stride = voxels[-1]
        self.down = nn.ModuleList()
        before = in_channels
        for width, kernel, stride in zip(channels, kernels, strides, strict=True):
            wide = tuple(max(k, 2 * s - 1) if s > 1 else k for k, s in zip(kernel, stride, strict=True))
            self.down.append(
                nn.Sequential(_Convolution(before, width, wide, stride), _Convolution(width, width, kernel))
            )
            before = width
        self.tokens = nn.Sequential(nn.LayerNorm(token_channels), nn.Linear(token_channels, channels[self.token_level]))
        self.gates = nn.ModuleList()
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        for level in range(len(channels) - 1):
            fine, coarse = channels[level], channels[level + 1]
            self.gates.append(TextAttentionGate(fine, coarse, text_channels, strides[level + 1]))
            self.up.append(nn.Conv3d(coarse, fine, 1))
            # one convolution each, as in the residual-encoder U-Nets of nnU-Net: what is seen is the encoder's affair
            self.merge.append(_Convolution(2 * fine, fine, kernels[level]))
        self.head = TextGuidedHead(channels[0], text_channels, stem_stride, head_channels)

    def forward(self, image: Tensor, tokens: Tensor, texts: Tensor, trunk_texts: Tensor | None = None) -> Tensor:
        """Draw.

        Args:
            image: (B, in_channels, d, h, w) in [0, 1], any size.
            tokens: (B, D, H, W, token_channels), of the same part of the scan, D = ceil(d / patch_size[0]) and so on.
            texts: (L, text_channels), one for each mask.
            trunk_texts: (B, L', text_channels), what the gates hear; None for all of `texts`.

        Returns:
            Logits (B, L, d, h, w).
        """
        size = image.shape[2:]
        if trunk_texts is None:
            trunk_texts = texts.expand(image.shape[0], *texts.shape)
        padding = [(-n) % s for n, s in zip(size, self.stride, strict=True)]
        if any(padding):
            image = pad(image, (0, padding[2], 0, padding[1], 0, padding[0]))
        skips = []
        x = image
        for level, block in enumerate(self.down):
            x = block(x)
            if level == self.token_level:
                projected = self.tokens(tokens).permute(0, 4, 1, 2, 3)
                missing = [have - given for have, given in zip(x.shape[2:], projected.shape[2:], strict=True)]
                if any(missing):
                    projected = pad(projected, (0, missing[2], 0, missing[1], 0, missing[0]))
                x = x + projected
            skips.append(x)
        for level in reversed(range(len(self.up))):
            skip = self.gates[level](skips[level], x, trunk_texts)
            x = _interpolated(self.up[level](x), skip.shape[2:])
            x = self.merge[level](torch.cat([skip, x], dim=1))
        return self.head(x, texts)[:, :, : size[0], : size[1], : size[2]]
