"""What the encoder has learnt, on the test split: beside an untrained encoder, a histogram and position-wise means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import (
    bootstrap_interval,
    effective_rank,
    intensity_histogram,
    knn_probe,
    linear_probe,
)
from ..networks.layers import region_shares_of_mask, volume_to_patches
from ..networks.nets import EncoderPretraining
from ..transforms.grey_levels import network_image

__all__ = ["RepresentationReport", "SplitFeatures", "evaluate_representation"]

SPLITS = ("training", "validation", "test")


@dataclass
class RepresentationReport:
    """Figures of one evaluation.

    Attributes:
        figures: name -> value, for logging and comparison; names end in the encoder they belong to.
        per_label: one row per label and feature source: label, features, auroc, positives and negatives in test.
    """

    figures: dict[str, float] = field(default_factory=dict)
    per_label: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class SplitFeatures:
    """What one encoder gives for one split.

    Attributes:
        labels: (N, L).
        guided: (N, 1 + R, C), global and region features with the anatomical mask where there is one.
        unguided: the same without any mask.
        histogram: (N, bins).
        region_share_error: mean over tokens of half the sum of absolute share differences: the part of a token given to
            a wrong region.
        mean_patches, mean_shares: position-wise means over the split; None where the volumes differ in size.
    """

    labels: np.ndarray
    guided: np.ndarray
    unguided: np.ndarray
    histogram: np.ndarray
    region_share_error: float
    mean_patches: Tensor | None
    mean_shares: Tensor | None


def _stack(features: Any) -> Tensor:
    return torch.cat([features.global_features[:, None], features.region_features], dim=1).float().cpu()


class _RunningMean:
    """Mean of tensors of one shape; None as soon as a shape differs."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0
        self.mixed = False

    def add(self, batch: Tensor) -> None:
        if self.total is not None and self.total.shape != batch.shape[1:]:
            self.mixed = True
        if not self.mixed and len(batch):
            self.total = batch.sum(0) if self.total is None else self.total + batch.sum(0)
            self.count += len(batch)

    def value(self) -> Tensor | None:
        return None if self.mixed or self.total is None else self.total / self.count


@torch.no_grad()
def collect_split(
    network: EncoderPretraining, loader: Iterable[Mapping[str, Tensor]], device: torch.device
) -> SplitFeatures:
    """Run an encoder over one split.

    Args:
        network: in evaluation mode.
        loader: batches as `encoder_pretraining_transforms` makes them.
        device: where to run.
    """
    encoder = network.encoder
    rows: dict[str, list[np.ndarray]] = {"labels": [], "guided": [], "unguided": [], "histogram": []}
    share_errors: list[float] = []
    mean_patches, mean_shares = _RunningMean(), _RunningMean()
    for batch in loader:
        image, mask = network_image(batch, device), batch["anatomical_mask"].to(device)
        has_mask = batch["has_anatomical_mask"].to(device)
        tokens = encoder.encode_tokens(image, batch["spacing_mm"].to(device))
        unguided = encoder.gather_regions(tokens, image)
        guided = encoder.gather_regions(tokens, image, mask, has_mask)

        shares = region_shares_of_mask(mask, encoder.patch_size, encoder.num_regions)
        wrong = (unguided.region_logits.softmax(-1) - shares).abs().sum(-1) / 2
        share_errors += wrong.mean(1)[has_mask].tolist()
        mean_patches.add(volume_to_patches(image, encoder.patch_size))
        mean_shares.add(shares[has_mask])

        rows["labels"].append(batch["labels"].numpy())
        rows["guided"].append(_stack(guided).numpy())
        rows["unguided"].append(_stack(unguided).numpy())
        rows["histogram"].append(np.stack([intensity_histogram(one) for one in image.cpu().numpy()]))
    return SplitFeatures(
        **{name: np.concatenate(values) for name, values in rows.items()},
        region_share_error=float(np.mean(share_errors)) if share_errors else float("nan"),
        mean_patches=mean_patches.value(),
        mean_shares=mean_shares.value(),
    )


@torch.no_grad()
def reconstruction_error(
    network: EncoderPretraining, loader: Iterable[Mapping[str, Tensor]], device: torch.device
) -> float:
    """Return the mean absolute error of hidden voxels, over the cases in which something is hidden.

    Args:
        network: in evaluation mode.
        loader: batches as `encoder_pretraining_transforms` makes them.
        device: where to run.
    """
    errors: list[float] = []
    for batch in loader:
        image, patch_mask = network_image(batch, device), batch["patch_mask"].to(device)
        tokens = network.encoder.encode_tokens(image, batch["spacing_mm"].to(device), patch_mask=patch_mask)
        patches = volume_to_patches(image, network.encoder.patch_size)
        errors += _masked_means(
            (network.heads.reconstruction(tokens.local_features) - patches).abs().mean(-1), patch_mask
        )
    return float(np.mean(errors)) if errors else float("nan")


def _masked_means(error: Tensor, mask: Tensor) -> list[float]:
    """Return the mean over hidden tokens of each case that has any."""
    hidden = mask.sum(1)
    return ((error * mask).sum(1) / hidden.clamp_min(1))[hidden > 0].tolist()


@torch.no_grad()
def position_wise_errors(
    mean_patches: Tensor | None,
    mean_shares: Tensor | None,
    loader: Iterable[Mapping[str, Tensor]],
    patch_size: tuple[int, int, int],
    num_regions: int,
) -> tuple[float, float]:
    """Return both errors of the trivial prediction, at each place the training split's mean; NaN if there is none."""
    reconstruction_errors, share_errors = [], []
    for batch in loader:
        if mean_patches is not None:
            error = (volume_to_patches(network_image(batch, "cpu"), patch_size) - mean_patches.cpu()).abs().mean(-1)
            reconstruction_errors += _masked_means(error, batch["patch_mask"])
        if mean_shares is not None:
            shares = region_shares_of_mask(batch["anatomical_mask"].cpu(), patch_size, num_regions)
            wrong = (shares - mean_shares.cpu()).abs().sum(-1) / 2
            share_errors += wrong.mean(1)[batch["has_anatomical_mask"]].tolist()
    return (
        float(np.mean(reconstruction_errors)) if reconstruction_errors else float("nan"),
        float(np.mean(share_errors)) if share_errors else float("nan"),
    )


def _label_features(features: np.ndarray, regions_of_label: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return per label (N, C + C · regions): the global feature beside those of the regions where the finding lives.

    A finding that lives in no region in particular has the global feature only.
    """
    return [
        np.concatenate([features[:, 0], features[:, list(regions)].reshape(len(features), -1)], axis=1)
        for regions in regions_of_label
    ]


def evaluate_representation(
    networks: Mapping[str, EncoderPretraining],
    loaders: Mapping[str, Iterable[Mapping[str, Tensor]]],
    label_names: Sequence[str],
    regions_of_label: Sequence[Sequence[int]],
    device: torch.device,
    num_resamples: int = 200,
    seed: int = 0,
) -> RepresentationReport:
    """Compare encoders on the test split.

    Args:
        networks: name -> network, for instance "trained" and "untrained".
        loaders: split -> batches; training fits probes, validation chooses their settings, test is scored.
        label_names: names of the L labels.
        regions_of_label: per label the indices (1 to R) of the regions where the finding lives.
        device: where to run.
        num_resamples: bootstrap resamples for the intervals.
        seed: of probes and bootstrap.
    """
    report = RepresentationReport()
    collected: dict[str, SplitFeatures] = {}
    for name, network in networks.items():
        network.to(device).eval()
        collected = {split: collect_split(network, loaders[split], device) for split in SPLITS}
        labels = {split: collected[split].labels for split in SPLITS}
        test = collected["test"]
        report.figures[f"reconstruction_error_{name}"] = reconstruction_error(network, loaders["test"], device)
        report.figures[f"region_share_error_{name}"] = test.region_share_error
        report.figures[f"effective_rank_{name}"] = effective_rank(test.unguided[:, 0])
        for way in ("unguided", "guided"):
            features = {split: getattr(collected[split], way) for split in SPLITS}
            per_label = {split: _label_features(features[split], regions_of_label) for split in SPLITS}
            scores, auroc = linear_probe(per_label, labels, seed)
            _record(
                report, f"{name}_{way}", "linear_probe", label_names, labels["test"], scores, auroc, num_resamples, seed
            )
        scores, auroc = knn_probe({split: collected[split].unguided[:, 0] for split in SPLITS}, labels)
        _record(report, f"{name}_unguided", "knn", label_names, labels["test"], scores, auroc, 0, seed)

    any_network = next(iter(networks.values()))
    encoder = any_network.encoder
    reconstruction, share = position_wise_errors(
        collected["training"].mean_patches,
        collected["training"].mean_shares,
        loaders["test"],
        encoder.patch_size,
        encoder.num_regions,
    )
    report.figures["reconstruction_error_training_mean"] = reconstruction
    report.figures["region_share_error_training_mean"] = share
    histogram = {split: [collected[split].histogram] * len(label_names) for split in SPLITS}
    labels = {split: collected[split].labels for split in SPLITS}
    scores, auroc = linear_probe(histogram, labels, seed)
    _record(report, "histogram", "linear_probe", label_names, labels["test"], scores, auroc, num_resamples, seed)
    return report


def _record(
    report: RepresentationReport,
    source: str,
    probe: str,
    label_names: Sequence[str],
    labels: np.ndarray,
    scores: np.ndarray,
    auroc: np.ndarray,
    num_resamples: int,
    seed: int,
) -> None:
    defined = ~np.isnan(auroc)
    macro = float(auroc[defined].mean()) if defined.any() else float("nan")
    report.figures[f"{probe}_macro_auroc_{source}"] = macro
    if num_resamples and defined.any():
        low, high = bootstrap_interval(labels[:, defined], scores[:, defined], num_resamples=num_resamples, seed=seed)
        report.figures[f"{probe}_macro_auroc_{source}_low"] = low
        report.figures[f"{probe}_macro_auroc_{source}_high"] = high
    for column, name in enumerate(label_names):
        report.per_label.append(
            {
                "label": name,
                "probe": probe,
                "features": source,
                "auroc": None if np.isnan(auroc[column]) else round(float(auroc[column]), 4),
                "test_positives": int(np.nansum(labels[:, column])),
                "test_known": int((~np.isnan(labels[:, column])).sum()),
            }
        )
