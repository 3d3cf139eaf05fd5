"""Masks that look a little like lesions: a few balls of different sizes, seeded."""

import numpy as np


def balls(shape, num, seed, radii=(1, 4)):
    """(D, H, W) bool."""
    generator = np.random.default_rng(seed)
    grid = np.indices(shape)
    mask = np.zeros(shape, dtype=bool)
    for _ in range(num):
        centre = generator.integers(0, shape)
        mask |= ((grid - centre.reshape(3, 1, 1, 1)) ** 2).sum(axis=0) <= generator.uniform(*radii) ** 2
    return mask


def blank(shape=(9, 11, 13)):
    return np.zeros(shape, dtype=bool)


def box_mask(*boxes, shape=(9, 11, 13)):
    """Mask of boxes, each ((k0, k1), (j0, j1), (i0, i1)), ends excluded."""
    mask = blank(shape)
    for (k0, k1), (j0, j1), (i0, i1) in boxes:
        mask[k0:k1, j0:j1, i0:i1] = True
    return mask
