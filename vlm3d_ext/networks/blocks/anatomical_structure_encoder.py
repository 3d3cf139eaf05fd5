"""Turns where and how large each anatomical region is into the query that asks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["AnatomicalStructureEncoder"]

_MILLIMETRES_PER_UNIT = 100.0  # brings centres and extents of a chest to the order of one


class AnatomicalStructureEncoder(nn.Module):
    """Queries for the regions, made of a learned embedding and of each region's measured geometry, plus one query for
    the whole volume.

    Measured are, from the shares: the part of the volume that the region fills (as its logarithm), its centre and its
    standard deviation along z, y and x. A large heart thus asks differently from a small one.

    Args:
        hidden_size: channels C.
        num_regions: number of regions R.
    """

    num_measures = 7

    def __init__(self, hidden_size: int, num_regions: int) -> None:
        super().__init__()
        self.region_embedding = nn.Parameter(torch.randn(num_regions, hidden_size) * 0.02)
        self.global_query = nn.Parameter(torch.randn(hidden_size) * 0.02)
        self.geometry_mlp = nn.Sequential(
            nn.Linear(self.num_measures, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def measure(self, shares: Tensor, positions_mm: Tensor) -> Tensor:
        """Return (B, R, 7): log volume share, centre z y x, standard deviation z y x, both in units of 100 mm.

        A region that is absent has the smallest log share, and its centre and extent are zero.

        Args:
            shares: (B, R, N) in [0, 1], zero at padding.
            positions_mm: (B, N, 3).
        """
        shares = shares.float()
        total = shares.sum(-1, keepdim=True)
        weights = shares / total.clamp_min(1e-6)
        positions = positions_mm.float() / _MILLIMETRES_PER_UNIT
        centre = torch.bmm(weights, positions)
        variance = (torch.bmm(weights, positions.square()) - centre.square()).clamp_min(0.0)
        # the square root's slope at zero is infinite; a region within one token has no extent anyway
        extent = (variance + 1e-6).sqrt()
        log_share = torch.log10(total / shares.shape[-1] + 1e-5)
        return torch.cat([log_share, centre, extent * (total > 1e-6)], dim=-1)

    def forward(self, shares: Tensor, positions_mm: Tensor) -> Tensor:
        """Return queries (B, 1 + R, C); the first is the whole volume's."""
        geometry = self.geometry_mlp(self.measure(shares, positions_mm).to(self.region_embedding.dtype))
        region_queries = self.region_embedding + geometry
        return torch.cat([self.global_query.expand(shares.shape[0], 1, -1), region_queries], dim=1)
