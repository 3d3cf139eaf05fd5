"""From logits to calibrated probabilities and decision thresholds, fitted on validation data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from .label_arrays import checked_labels, checked_scores

__all__ = ["ClassifierCalibration", "fit_calibration", "fit_thresholds", "negative_log_likelihood", "rescale_to_half"]

# Prior standard deviations of the fit. A class weight w shifts a logit by log(w); weights reach 50, log(50) = 3.9, that
# is two of these. The slope 1 / temperature is 1 for a model whose logits can be taken at their word.
_OFFSET_DEVIATION = 2.0
_SLOPE_DEVIATION = 1.0
_SLOPE_LIMITS = (0.05, 20.0)
_SMALLEST_THRESHOLD = 1e-12  # 0 and 1 have no log-odds, so no threshold can be there


@dataclass(frozen=True, eq=False)
class ClassifierCalibration:
    """One temperature, and an offset and a threshold for each label.

    Args:
        temperature: shared by all labels, > 0.
        offsets: (L,), added to the logits after the division by the temperature.
        thresholds: (L,), in (0, 1); a calibrated probability at the threshold or above is a yes.

    Raises:
        ValueError: if a value is outside its range, or there is not one threshold for every offset.
    """

    temperature: float
    offsets: np.ndarray
    thresholds: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        for name in ("offsets", "thresholds"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        if self.offsets.ndim != 1 or self.offsets.shape != self.thresholds.shape:
            raise ValueError(
                f"offsets and thresholds must both be (labels,), got {self.offsets.shape} and {self.thresholds.shape}."
            )
        if not np.isfinite(self.offsets).all():
            raise ValueError(f"offsets must be finite, got {self.offsets.tolist()}.")
        if not ((self.thresholds > 0) & (self.thresholds < 1)).all():
            raise ValueError(f"thresholds must lie between 0 and 1, got {self.thresholds.tolist()}.")

    @classmethod
    def identity(cls, num_labels: int) -> ClassifierCalibration:
        """Return the calibration that changes nothing and decides at 0.5."""
        return cls(1.0, np.zeros(num_labels), np.full(num_labels, 0.5))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return sigmoid(logits / temperature + offsets), (N, L).

        Raises:
            ValueError: if there are not as many labels as offsets.
        """
        logits = np.asarray(logits, dtype=np.float64)
        if logits.shape[-1:] != self.offsets.shape:
            raise ValueError(f"logits must be (cases, {len(self.offsets)}), got {logits.shape}.")
        return expit(logits / self.temperature + self.offsets)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, for a checkpoint or JSON."""
        return {
            "temperature": self.temperature,
            "offsets": self.offsets.tolist(),
            "thresholds": self.thresholds.tolist(),
        }


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> ClassifierCalibration:
    """Fit temperature, offsets and thresholds. Use validation data, never test data.

    The probability is sigmoid(logit / T + b_l). One T for all labels (temperature scaling, Guo et al. 2017) corrects
    over-confidence; one offset b_l per label is needed because a loss with class weights shifts the log-odds of each
    label by about the log of its weight. Minimised is the negative log-likelihood of the known entries plus a Gaussian
    prior: 1 / T about 1, and b_l about the mean offset of all labels. A label with few positives therefore stays near
    the others instead of running off; one with known entries of one class only (or none) takes no part, gets the mean
    offset of the others (0 if there are none) and the threshold 0.5. The problem is convex, and the prior is 0 where
    nothing is changed, so the likelihood of the labels that take part is never worse than with the plain logits.

    Args:
        logits: (N, L).
        labels: (N, L) of 1, 0 or NaN.

    Raises:
        ValueError: if the arrays do not fit each other, or a logit with a known label is not finite.
    """
    labels = checked_labels(labels)
    logits = checked_scores(labels, logits)
    usable = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    temperature, offsets = 1.0, np.zeros(labels.shape[1])
    if usable.any():
        slope, mean_offset, deviations = _fit_slope_and_offsets(logits[:, usable], labels[:, usable])
        temperature, offsets[:] = 1 / slope, mean_offset
        offsets[usable] += deviations
    probabilities = expit(logits / temperature + offsets)
    return ClassifierCalibration(temperature, offsets, fit_thresholds(probabilities, labels))


def _fit_slope_and_offsets(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return 1 / T, the mean offset, and each label's deviation from it."""
    known = ~np.isnan(labels)
    truth = np.where(known, labels, 0.0)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, deviations = parameters[0], parameters[2:]
        scaled = logits * slope + parameters[1] + deviations
        loss = np.where(known, np.logaddexp(0, scaled) - truth * scaled, 0.0).sum()
        residual = np.where(known, expit(scaled) - truth, 0.0)
        of_labels = residual.sum(axis=0)
        prior = ((slope - 1) / _SLOPE_DEVIATION) ** 2 / 2 + ((deviations / _OFFSET_DEVIATION) ** 2).sum() / 2
        gradient = np.concatenate(
            [
                [(residual * logits).sum() + (slope - 1) / _SLOPE_DEVIATION**2, of_labels.sum()],
                of_labels + deviations / _OFFSET_DEVIATION**2,
            ]
        )
        return float(loss + prior), gradient

    start = np.zeros(2 + logits.shape[1])
    start[0] = 1.0
    bounds = [_SLOPE_LIMITS] + [(None, None)] * (len(start) - 1)
    options = {"maxiter": 1000, "ftol": 1e-12, "gtol": 1e-8}
    result = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(result.x[0]), float(result.x[1]), result.x[2:]


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean binary cross-entropy over known entries in nats, NaN if there are none.

    Args:
        logits: (N, L), for calibrated ones logits / temperature + offsets.
        labels: (N, L) of 1, 0 or NaN.

    Raises:
        ValueError: if the arrays do not fit each other.
    """
    labels = checked_labels(labels)
    logits = checked_scores(labels, logits)
    known = ~np.isnan(labels)
    if not known.any():
        return float("nan")
    return float((np.logaddexp(0, logits[known]) - labels[known] * logits[known]).mean())


def fit_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return for each label the threshold with the best F1, (L,).

    Thresholds lie midway between neighbouring probabilities, so that a small shift in new data changes least. Of
    several cuts with the same best F1, that in the widest gap is taken, then the one nearest to 0.5. A label with known
    entries of one class only gets 0.5.

    Args:
        probabilities: (N, L) in [0, 1].
        labels: (N, L) of 1, 0 or NaN.

    Raises:
        ValueError: if the arrays do not fit each other.
    """
    labels = checked_labels(labels)
    probabilities = checked_scores(labels, probabilities)
    thresholds = np.full(labels.shape[1], 0.5)
    for column in range(labels.shape[1]):
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column] == 1
        if truth.any() and not truth.all():
            thresholds[column] = _best_threshold(probabilities[known, column], truth)
    return thresholds


def _best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    order = np.argsort(-probabilities, kind="stable")
    descending, hits = probabilities[order], truth[order].cumsum()
    ends = np.flatnonzero(np.append(descending[1:] != descending[:-1], True))
    f1 = 2 * hits[ends] / (ends + 1 + truth.sum())
    upper = descending[ends]
    lower = np.append(upper[1:], 0.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)  # equal fractions may differ in the last bit
    gaps, middles = upper[best] - lower[best], (upper[best] + lower[best]) / 2
    chosen = int(np.lexsort((np.abs(middles - 0.5), -gaps))[0])
    # between neighbouring floats there is no middle, and the lower one would let the next case in
    threshold = middles[chosen] if middles[chosen] > lower[best][chosen] else upper[best][chosen]
    return float(np.clip(threshold, _SMALLEST_THRESHOLD, 1 - _SMALLEST_THRESHOLD))


def rescale_to_half(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return probabilities for which 0.5 decides what the thresholds decided before.

    Each label's log-odds are shifted by those of its threshold: p (1 - t) / (p (1 - t) + (1 - p) t). That is monotone,
    so rankings stay; the threshold goes to 0.5, 0 and 1 stay. For the challenge, which scores at a fixed 0.5. What
    comes out is no longer calibrated.

    Args:
        probabilities: (N, L) in [0, 1].
        thresholds: (L,) in (0, 1).

    Raises:
        ValueError: if a probability or a threshold is outside its range.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must lie in [0, 1] to be rescaled.")
    if not ((thresholds > 0) & (thresholds < 1)).all():
        raise ValueError(f"thresholds must lie between 0 and 1, got {thresholds.tolist()}.")
    yes, no = probabilities * (1 - thresholds), (1 - probabilities) * thresholds
    rescaled = yes / (yes + no)
    # rounding must not carry a case across the cut
    below = np.minimum(rescaled, np.nextafter(0.5, 0.0))
    return np.where(probabilities >= thresholds, np.maximum(rescaled, 0.5), below)
