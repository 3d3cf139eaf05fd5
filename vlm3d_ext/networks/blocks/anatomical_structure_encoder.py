"""Turns where, how large and how dense each anatomical region is into the query that asks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AnatomicalStructureEncoder"]

_MILLIMETRES_PER_UNIT = 100.0  # brings centres and extents of a chest to the order of one
_SMALLEST_VOLUME_ML = 0.1


class AnatomicalStructureEncoder(nn.Module):
    """Queries for the whole volume and for each region: a learned embedding plus what is measured in the region.

    Measured are its volume, its centre, its extent along z, y and x, and the distribution of intensities in it. A
    large heart thus asks differently from a small one, an emphysematous lobe from a consolidated one: the share of
    voxels below -950 HU by which emphysema is graded is such a distribution's first bin. Shares of voxels enter as
    their square root, which makes 1 % count beside 50 %.

    Source: CT densitometry (Müller et al. 1988); the square root of histograms (Arandjelović and Zisserman 2012,
    section 2).

    Args:
        hidden_size: channels C.
        num_regions: number of regions R.
        num_intensities: length of the distribution, bins times input channels.
    """

    num_geometry_measures = 7

    def __init__(self, hidden_size: int, num_regions: int, num_intensities: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1 + num_regions, hidden_size) * 0.02)
        self.measure_mlp = nn.Sequential(
            nn.Linear(self.num_geometry_measures + num_intensities, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),  # what is measured then weighs as much as the mean token it is added to
        )

    def measure(self, shares: Tensor, positions_mm: Tensor, token_ml: Tensor, intensities: Tensor) -> Tensor:
        """Return (B, 1 + R, 7 + I), every entry of the order of one.

        These are: half the log10 of the volume in ml, centre z y x and standard deviation z y x in units of 100 mm,
        square roots of the intensity shares.

        A region that is absent has the smallest log volume, and everything else is zero.

        Args:
            shares: (B, 1 + R, N) in [0, 1], zero at padding; the first is the whole volume.
            positions_mm: (B, N, 3).
            token_ml: (B,) volume of one token.
            intensities: (B, 1 + R, I) shares of the region's voxels in each intensity bin.
        """
        shares = shares.float()
        total = shares.sum(-1, keepdim=True)
        present = total > 1e-6
        weights = shares / total.clamp_min(1e-6)
        positions = positions_mm.float() / _MILLIMETRES_PER_UNIT
        centre = torch.bmm(weights, positions)
        variance = (torch.bmm(weights, positions.square()) - centre.square()).clamp_min(0.0)
        # the square root's slope at zero is infinite; a region within one token has no extent anyway
        extent = (variance + 1e-6).sqrt() * present
        log_volume = torch.log10(total * token_ml.view(-1, 1, 1) + _SMALLEST_VOLUME_ML) / 2
        density = (intensities + 1e-6).sqrt() * present
        return torch.cat([log_volume, centre, extent, density], dim=-1)

    def forward(self, shares: Tensor, positions_mm: Tensor, token_ml: Tensor, intensities: Tensor) -> Tensor:
        """Return queries (B, 1 + R, C); the first is the whole volume's. The arguments are those of `measure`."""
        measures = self.measure(shares, positions_mm, token_ml, intensities)
        return self.embedding + self.measure_mlp(measures.to(self.embedding.dtype))
