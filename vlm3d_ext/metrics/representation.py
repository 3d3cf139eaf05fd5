"""What frozen features are worth: probes, effective rank, and the histogram that any of it must beat."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from .multi_label import per_label_auroc

__all__ = ["effective_rank", "intensity_histogram", "knn_probe", "linear_probe"]

REGULARISATION_GRID = (1e-4, 1e-3, 1e-2, 1e-1)
NEIGHBOUR_GRID = (5, 10, 20)


def effective_rank(features: np.ndarray) -> float:
    """Return the exponential of the entropy of the normalised singular values of the centred features.

    1 means that all cases lie on a line, min(N, C) that no direction is preferred.

    Source: Roy and Vetterli 2007, definition 1.

    Args:
        features: (N, C).
    """
    singular_values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    total = singular_values.sum()
    if total <= 0:
        return 1.0
    weights = singular_values / total
    weights = weights[weights > 0]
    return float(np.exp(-(weights * np.log(weights)).sum()))


def intensity_histogram(image: np.ndarray, num_bins: int = 32) -> np.ndarray:
    """Return the relative histogram of each channel, (C · num_bins,), of an image (C, D, H, W) in [0, 1]."""
    return np.concatenate([np.histogram(channel, num_bins, (0.0, 1.0))[0] / channel.size for channel in image])


def linear_probe(
    features: Mapping[str, Sequence[np.ndarray]], labels: Mapping[str, np.ndarray], seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression per label on frozen features.

    Fitted on training; the strength of the L2 penalty is chosen per label on validation; test is only scored.

    Args:
        features: split -> one (N, C) array per label (labels may look at different regions); splits "training",
            "validation", "test".
        labels: split -> (N, L) of 1, 0 or NaN.
        seed: of the solver.

    Returns:
        Scores on test (N, L), and AUROC per label (L,), NaN where training or test holds one class only.
    """
    num_labels = labels["test"].shape[1]
    scores = np.zeros((len(labels["test"]), num_labels))
    fitted = np.zeros(num_labels, dtype=bool)
    for column in range(num_labels):
        known = ~np.isnan(labels["training"][:, column])
        target = labels["training"][known, column]
        if len(np.unique(target)) < 2:
            continue
        scaler = StandardScaler().fit(features["training"][column][known])
        x = {split: scaler.transform(features[split][column]) for split in features}
        best = -np.inf
        for strength in REGULARISATION_GRID:
            probe = LogisticRegression(C=strength, max_iter=500, class_weight="balanced", random_state=seed)
            with warnings.catch_warnings():
                # an unfinished fit is judged on validation like any other
                warnings.simplefilter("ignore", ConvergenceWarning)
                probe.fit(x["training"][known], target)
            on_validation = per_label_auroc(
                labels["validation"][:, [column]], probe.decision_function(x["validation"])[:, None]
            )[0]
            on_validation = 0.5 if np.isnan(on_validation) else on_validation
            if on_validation > best:
                best = on_validation
                scores[:, column] = probe.decision_function(x["test"])
        fitted[column] = True
    auroc = per_label_auroc(labels["test"], scores)
    auroc[~fitted] = np.nan
    return scores, auroc


def knn_probe(features: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Score test cases by the mean label of their nearest training cases in cosine distance.

    The number of neighbours is the one of 5, 10, 20 with the best macro AUROC on validation. Unknown labels of
    neighbours are left out.

    Args:
        features: split -> (N, C).
        labels: split -> (N, L).

    Returns:
        Scores on test (N, L), and AUROC per label (L,).
    """
    centre = features["training"].mean(0)
    unit = {
        s: (f - centre) / np.maximum(np.linalg.norm(f - centre, axis=1, keepdims=True), 1e-12)
        for s, f in features.items()
    }
    known = ~np.isnan(labels["training"])
    values = np.nan_to_num(labels["training"])
    prior = values.sum(0) / np.maximum(known.sum(0), 1)

    def neighbours_mean(split: str, k: int) -> np.ndarray:
        nearest = np.argsort(-(unit[split] @ unit["training"].T), axis=1, kind="stable")[:, :k]
        count = known[nearest].sum(1)
        return np.where(count > 0, values[nearest].sum(1) / np.maximum(count, 1), prior)

    def validation_score(k: int) -> float:
        aurocs = per_label_auroc(labels["validation"], neighbours_mean("validation", k))
        return float(np.nanmean(aurocs)) if not np.isnan(aurocs).all() else 0.0

    best = max((k for k in NEIGHBOUR_GRID if k <= len(values)), key=validation_score, default=len(values))
    scores = neighbours_mean("test", best)
    return scores, per_label_auroc(labels["test"], scores)
