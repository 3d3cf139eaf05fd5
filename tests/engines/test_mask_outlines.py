from itertools import pairwise

import numpy as np
import pytest

from vlm3d_ext.engines.mask_outlines import mask_outlines


def filled(outlines, shape):
    """Fill outlines by the winding number of each pixel's centre: corners left of it that run up minus those down."""
    winding = np.zeros(shape, dtype=int)
    for outline in outlines:
        for (r0, c0), (r1, c1) in pairwise(outline):
            if c0 == c1:
                low, high = sorted((int(r0), int(r1)))
                winding[low:high, int(c0) :] += -1 if r1 > r0 else 1
    return winding


def test_a_rectangle_has_its_four_corners():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:3, 2:7] = True
    (outline,) = mask_outlines(mask)
    np.testing.assert_array_equal(outline, [[1, 2], [1, 7], [3, 7], [3, 2], [1, 2]])


def test_a_single_pixel_at_the_border():
    mask = np.zeros((3, 4), dtype=bool)
    mask[2, 3] = True
    (outline,) = mask_outlines(mask)
    np.testing.assert_array_equal(outline, [[2, 3], [2, 4], [3, 4], [3, 3], [2, 3]])


def test_a_hole_is_outlined_the_other_way_and_corners_that_touch_apart():
    ring = np.ones((3, 3), dtype=bool)
    ring[1, 1] = False
    outer, inner = mask_outlines(ring)
    np.testing.assert_array_equal(outer, [[0, 0], [0, 3], [3, 3], [3, 0], [0, 0]])
    assert filled([inner], (3, 3))[1, 1] == -1 and len(inner) == 5
    assert [len(outline) for outline in mask_outlines(np.eye(3, dtype=bool))] == [5, 5, 5]
    assert mask_outlines(np.zeros((4, 5), dtype=bool)) == []


@pytest.mark.parametrize("seed", range(4))
def test_filling_the_outlines_gives_the_mask_again(seed):
    mask = np.random.default_rng(seed).random((13, 17)) > 0.45
    outlines = mask_outlines(mask)
    np.testing.assert_array_equal(filled(outlines, mask.shape), mask.astype(int))
    for outline in outlines:
        steps = np.diff(outline, axis=0)
        np.testing.assert_array_equal(outline[0], outline[-1])
        assert ((steps != 0).sum(axis=1) == 1).all()  # along one axis at a time
        assert (np.abs(np.sum(steps[1:] * steps[:-1], axis=1)) == 0).all()  # turning at every corner
