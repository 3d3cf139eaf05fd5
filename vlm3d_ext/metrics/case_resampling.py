"""Bootstrap resamples as weights of cases, which metrics can take all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["percentile_interval", "resampling_weights"]


def resampling_weights(
    num_cases: int, num_resamples: int = 200, seed: int = 0, groups: Sequence[str] | None = None
) -> np.ndarray:
    """Return how often each case is in each resample, (R, N).

    The draws are those of `bootstrap_interval` with the same seed.

    Args:
        num_cases: N.
        num_resamples: R.
        seed: of the draws.
        groups: (N,), for instance patients: whole groups are drawn, because cases of one group are not independent;
            None draws cases.

    Raises:
        ValueError: unless there is a group for every case.
    """
    generator = np.random.default_rng(seed)
    if groups is None:
        members = np.arange(num_cases)
    elif len(groups) == num_cases:
        members = np.unique(np.asarray(groups), return_inverse=True)[1]
    else:
        raise ValueError(f"groups must name one group for each of the {num_cases} cases, got {len(groups)}.")
    num_groups = int(members.max()) + 1 if num_cases else 0
    drawn = [
        np.bincount(generator.integers(0, num_groups, num_groups), minlength=num_groups) for _ in range(num_resamples)
    ]
    return np.array(drawn, dtype=np.int64).reshape(num_resamples, num_groups)[:, members]


def percentile_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper end of the percentile interval over the first axis.

    Source: Efron 1979; percentile method.

    Args:
        values: (R, ...), one per resample; resamples where a figure is undefined (NaN) are left out, and the interval
            is NaN if all are.
        confidence: coverage, 0 to 1.
    """
    values = np.asarray(values, dtype=np.float64)
    tail = (1 - confidence) / 2
    low, high = np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    defined = ~np.isnan(values).all(axis=0) if len(values) else np.zeros(values.shape[1:], dtype=bool)
    if defined.any():
        low[defined], high[defined] = np.nanquantile(values[:, defined], [tail, 1 - tail], axis=0)
    return low, high
