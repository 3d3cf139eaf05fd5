"""Where tokens are, in millimetres, and how the network is told.

Shapes: B batch, N tokens, D slabs along depth, C channels, E channels of one attention head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["RotaryDepthEmbedding", "SineCosinePositionEmbedding", "token_centres_mm"]


def token_centres_mm(
    grid_size: Sequence[int], patch_size: Sequence[int], spacing_mm: Tensor, valid_size: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token centres along z, y and x, in millimetres from the centre of the volume.

    The centre is that of the real voxels, so padding behind them moves no token.

    Args:
        grid_size: (D, H, W) tokens, of the padded volume.
        patch_size: (D, H, W) voxels of a token.
        spacing_mm: (B, 3) voxel spacing [z, y, x].
        valid_size: (B, 3) voxels of the volume before padding; None where nothing was padded.

    Returns:
        Three tensors (B, D), (B, H), (B, W).

    Example:
        64 slices of 5 mm in slabs of 4: the centres lie at -150, -130, ..., 150 mm.
    """
    centres = []
    for axis in range(3):
        size_vox = float(grid_size[axis] * patch_size[axis])
        middle_vox = valid_size[:, axis, None].to(spacing_mm) / 2 if valid_size is not None else size_vox / 2
        index = torch.arange(grid_size[axis], device=spacing_mm.device, dtype=spacing_mm.dtype)
        centres.append(((index + 0.5) * patch_size[axis] - middle_vox) * spacing_mm[:, axis, None])
    return centres[0], centres[1], centres[2]


def _angular_frequencies(num: int, shortest_wavelength_mm: float, longest_wavelength_mm: float) -> Tensor:
    """Return `num` angular frequencies in 1/mm whose wavelengths are a geometric series."""
    wavelengths = torch.logspace(math.log10(shortest_wavelength_mm), math.log10(longest_wavelength_mm), num)
    return 2 * math.pi / wavelengths


class SineCosinePositionEmbedding(nn.Module):
    """Fixed sine-cosine position embedding of millimetres, a third of the channels for each axis.

    Without a table of learned positions any grid works and no parameters are spent. Channels left over by the division
    by six are zero.

    Source: Vaswani et al. 2017, section 3.5, with positions in millimetres instead of indices.

    Args:
        hidden_size: number of channels C.
        shortest_wavelength_mm: at least two slabs of a thick-slice scan (4 x 5 mm each). A shorter wave is sampled at
            less than its Nyquist rate there, and the same chest in thin and in thick slices would get other codes.
        longest_wavelength_mm: longer than any chest, so that no two places share a code.
    """

    frequencies: Tensor

    def __init__(
        self, hidden_size: int, shortest_wavelength_mm: float = 60.0, longest_wavelength_mm: float = 2000.0
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        frequencies = _angular_frequencies(hidden_size // 6, shortest_wavelength_mm, longest_wavelength_mm)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def _encode(self, position_mm: Tensor) -> Tensor:
        angle = position_mm[..., None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, z_mm: Tensor, y_mm: Tensor, x_mm: Tensor) -> Tensor:
        """Return (B, D, H, W, C) for centres (B, D), (B, H), (B, W)."""
        shape = (z_mm.shape[0], z_mm.shape[1], y_mm.shape[1], x_mm.shape[1], -1)
        parts = [
            self._encode(z_mm)[:, :, None, None].expand(shape),
            self._encode(y_mm)[:, None, :, None].expand(shape),
            self._encode(x_mm)[:, None, None, :].expand(shape),
        ]
        embedding = torch.cat(parts, dim=-1)
        return nn.functional.pad(embedding, (0, self.hidden_size - embedding.shape[-1]))


class RotaryDepthEmbedding(nn.Module):
    """Rotates queries and keys by their height in millimetres, so attention along depth depends on physical distance.

    Source: RoFormer (Su et al. 2021), equation 34, with millimetres instead of indices.

    Args:
        head_dim: channels E of one head, even.
        shortest_wavelength_mm: at least two slabs, for the reason given in `SineCosinePositionEmbedding`.
        longest_wavelength_mm: beyond the length of a chest.
    """

    frequencies: Tensor

    def __init__(
        self, head_dim: int, shortest_wavelength_mm: float = 60.0, longest_wavelength_mm: float = 2000.0
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}.")
        frequencies = _angular_frequencies(head_dim // 2, shortest_wavelength_mm, longest_wavelength_mm)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, z_mm: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each (B, D, E / 2), for heights (B, D)."""
        angle = z_mm[..., None] * self.frequencies
        return angle.cos(), angle.sin()

    @staticmethod
    def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotate channel pairs (e, e + E / 2) of `x` (..., D, E); `cosine` and `sine` broadcast to (..., D, E / 2)."""
        # to the rotation's type once, not in each of the four products
        first, second = x.to(cosine.dtype).chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
