"""Overlap of a predicted mask with the true one."""

from __future__ import annotations

import numpy as np

__all__ = ["check_masks", "dice_score"]


def dice_score(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return the Dice score 2 |P ∩ T| / (|P| + |T|), 0 to 1; NaN where both masks are empty.

    Source: Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945.

    Args:
        prediction: (D, H, W) bool.
        truth: (D, H, W) bool.

    Raises:
        TypeError: if a mask is not bool.
        ValueError: if a mask is not 3D, or the shapes differ.
    """
    check_masks(prediction, truth)
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(prediction & truth) / total if total else float("nan")


def check_masks(prediction: np.ndarray, truth: np.ndarray) -> None:
    """Check that two masks can be compared.

    Raises:
        TypeError: if a mask is not bool: of labels or probabilities it is not known what counts as lesion.
        ValueError: if a mask is not 3D, or the shapes differ.
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != np.bool_:
            raise TypeError(f"the {name} must be a bool mask, got {mask.dtype}; compare it with a threshold first.")
    if prediction.ndim != 3 or prediction.shape != truth.shape:
        raise ValueError(
            f"prediction and truth must be (D, H, W) on one grid, got shapes {prediction.shape} and {truth.shape}."
        )
