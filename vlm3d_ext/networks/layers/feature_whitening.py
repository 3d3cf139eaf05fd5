"""Whitening of the encoder's features, with statistics of the training data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FeatureMoments", "FeatureWhitening"]

# A mean variance below this part of the squared mean, 1e-5 of the mean in standard deviations, is the rounding of
# float32 features that are all alike, not a difference between cases.
_SMALLEST_RELATIVE_VARIANCE = 1e-10


class FeatureMoments:
    """Running first and second moments of T feature vectors per case, in float64.

    Args:
        num_tokens: T, the global feature and the regions.
        channels: C.
    """

    def __init__(self, num_tokens: int, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(num_tokens, channels, dtype=torch.float64)
        self.outer = torch.zeros(num_tokens, channels, channels, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add features (B, T, C)."""
        features = features.detach().to("cpu", torch.float64)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer += torch.einsum("btc,btd->tcd", features, features)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Return the mean (T, C) and the covariance (T, C, C)."""
        mean = self.sum / self.count
        return mean, self.outer / self.count - torch.einsum("tc,td->tcd", mean, mean)


class FeatureWhitening(nn.Module):
    """Makes the channels of each of T features uncorrelated and of like variance.

    A transformer's features are dominated by a common mean and a few directions of large variance; what tells findings
    apart lies in small ones, where gradient descent would need a great many steps. The transform is
    (x - mean) · (covariance + shrinkage · mean eigenvalue)^(-1/2), one for each token; before `fit`, the identity.
    It has no parameters, its statistics are buffers of the checkpoint.

    Source: ZCA whitening, Kessy et al., "Optimal whitening and decorrelation", 2018, equation 9; shrinkage of the
    covariance toward the identity, Ledoit and Wolf 2004.

    Args:
        num_tokens: T.
        channels: C.
        shrinkage: what is added to each eigenvalue of the covariance, as a part of their mean. Directions of less
            variance than that are not blown up.

    Raises:
        ValueError: if the shrinkage is not positive.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, num_tokens: int, channels: int, shrinkage: float = 0.1) -> None:
        super().__init__()
        if not shrinkage > 0:
            raise ValueError(f"shrinkage must be greater than 0, got {shrinkage}.")
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(num_tokens, channels))
        self.register_buffer("matrix", torch.eye(channels).repeat(num_tokens, 1, 1))

    def fit(self, moments: FeatureMoments) -> None:
        """Take the statistics of training features.

        Raises:
            ValueError: if there are fewer than two cases, or the features do not vary at all.
        """
        if moments.count < 2:
            raise ValueError(f"whitening needs the features of at least 2 cases, got {int(moments.count)}.")
        mean, covariance = moments.mean_and_covariance()
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        eigenvalues = eigenvalues.clamp_min(0)
        typical = eigenvalues.mean(1, keepdim=True)
        varies = typical > _SMALLEST_RELATIVE_VARIANCE * mean.square().mean(1, keepdim=True)
        if not varies.any():
            raise ValueError("the features are the same for all cases; is the encoder's checkpoint trained?")
        # a region that no case shows has no variance: it is left as it is
        scale = torch.where(varies, (eigenvalues + self.shrinkage * typical) ** -0.5, 1.0)
        self.mean.copy_(mean)
        self.matrix.copy_(torch.einsum("tcd,td,ted->tce", vectors, scale, vectors))

    def forward(self, features: Tensor) -> Tensor:
        """Return the whitened features (B, T, C)."""
        # in bfloat16 the small directions, which whitening is for, would be rounding errors
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return torch.einsum("btc,tcd->btd", features.float() - self.mean, self.matrix)
        return torch.einsum("btc,tcd->btd", features - self.mean, self.matrix)
