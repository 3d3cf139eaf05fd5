"""From what a classifier says of a finding and what a localizer draws of it to one calibrated probability."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

__all__ = ["LesionFusion", "fit_lesion_fusion"]

_FEWEST_OF_A_KIND = 2
_PRIOR_DEVIATION = 2.0


@dataclass(frozen=True)
class LesionFusion:
    """The logit of a finding: `classifier` · z + `lesion` · e + `offset`.

    Args:
        classifier: weight of the classifier's logit z.
        lesion: weight of the lesion's evidence e.
        offset: added.
    """

    classifier: float
    lesion: float
    offset: float

    def probabilities(self, logits: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        """Return probabilities (N,) of logits and evidence, both (N,)."""
        return expit(self.classifier * logits + self.lesion * evidence + self.offset)


def fit_lesion_fusion(logits: np.ndarray, evidence: np.ndarray, labels: np.ndarray) -> LesionFusion | None:
    """Fit a logistic regression of a finding's labels on two witnesses, both standardised.

    A normal prior of deviation 2 holds the three weights: a validation set may have few cases, and witnesses that part
    it perfectly would otherwise get infinite weights. The lesion's weight cannot be negative.

    Source: Platt, "Probabilistic outputs for support vector machines", 1999, with a second input and a prior.

    Args:
        logits: (N,) of the classifier.
        evidence: (N,), such as the largest logit of the disease in the scan.
        labels: (N,) of 1, 0 or NaN, which is left out.

    Returns:
        None where there are fewer than two positives or two negatives, or where the evidence is the same everywhere.
    """
    known = ~np.isnan(labels)
    z, e, y = (np.asarray(values, dtype=np.float64)[known] for values in (logits, evidence, labels))
    if min(np.count_nonzero(y == 1), np.count_nonzero(y == 0)) < _FEWEST_OF_A_KIND or z.std() == 0 or e.std() == 0:
        return None
    inputs = np.stack([(z - z.mean()) / z.std(), (e - e.mean()) / e.std(), np.ones_like(z)])

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        fused = weights @ inputs
        loss = (np.logaddexp(0, fused) - y * fused).sum() + 0.5 * np.square(weights / _PRIOR_DEVIATION).sum()
        return float(loss), inputs @ (expit(fused) - y) + weights / _PRIOR_DEVIATION**2

    fitted = minimize(objective, np.zeros(3), jac=True, bounds=[(None, None), (0, None), (None, None)]).x
    classifier, lesion = fitted[0] / z.std(), fitted[1] / e.std()
    return LesionFusion(float(classifier), float(lesion), float(fitted[2] - classifier * z.mean() - lesion * e.mean()))
