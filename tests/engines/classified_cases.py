"""Cases with logits and labels for the tests of evaluating a classifier."""

import numpy as np
from scipy.special import expit

from vlm3d_ext.text.label_set import load_label_set

LABEL_NAMES = load_label_set("ct_rate_18").names


def classified_cases(num=300, seed=0):
    """Return logits and labels (num, 18): label 3 has no positives, 7 nothing known, 9 no negatives; some unknown."""
    generator = np.random.default_rng(seed)
    true = generator.normal(np.linspace(-3, 0.5, 18), 2, (num, 18))
    labels = (generator.random(true.shape) < expit(true)).astype(float)
    labels[generator.random(labels.shape) < 0.1] = np.nan
    labels[:, 3], labels[:, 7], labels[:, 9] = 0, np.nan, 1
    return true + generator.normal(0, 1.5, true.shape), labels
