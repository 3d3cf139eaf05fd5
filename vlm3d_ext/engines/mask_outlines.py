"""Outlines of a mask's slice, exactly along the edges of its pixels.

A contour interpolated between pixel centres, as plotting libraries draw it, lies up to half a pixel inside the mask; of
a nodule three pixels wide that is a third.
"""

from __future__ import annotations

import numpy as np

__all__ = ["mask_outlines"]

# Right, down, left, up, as steps (row, column) on the corners of pixels, rows growing downwards.
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def mask_outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return the closed outlines of a mask as corners of pixels.

    Pixel (r, c) reaches from corner (r, c) to corner (r + 1, c + 1). The mask lies to the right of an outline's
    direction, so outer outlines run clockwise as drawn with rows downwards, and holes the other way; pixels that touch
    at a corner only are outlined apart.

    Args:
        mask: (H, W) bool.

    Returns:
        Outlines (N, 2) of (row, column) float64, the last corner being the first again, without corners in straight
        runs.
    """
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    inside = padded[1:-1, 1:-1]
    # An edge of a pixel is part of the outline where the pixel on its other side is outside.
    starts = {
        0: np.argwhere(inside & ~padded[:-2, 1:-1]),  # along the top, to the right
        1: np.argwhere(inside & ~padded[1:-1, 2:]) + (0, 1),  # along the right side, down
        2: np.argwhere(inside & ~padded[2:, 1:-1]) + (1, 1),  # along the bottom, to the left
        3: np.argwhere(inside & ~padded[1:-1, :-2]) + (1, 0),  # along the left side, up
    }
    open_edges = {(int(r), int(c), direction) for direction, places in starts.items() for r, c in places}
    outlines = []
    # Sorted, since the order of a set is not the same in every process, and equal masks must give equal pictures.
    for first in sorted(open_edges):
        if first not in open_edges:
            continue
        corners, edge = [], first
        previous = None
        while edge in open_edges:
            open_edges.remove(edge)
            row, column, direction = edge
            if direction != previous:
                corners.append((row, column))
            previous = direction
            row, column = row + _STEPS[direction][0], column + _STEPS[direction][1]
            # Where two pixels meet at a corner, turning right stays with this pixel.
            turns = ((direction + turn) % 4 for turn in (1, 0, -1))
            edge = next(((row, column, d) for d in turns if (row, column, d) in open_edges), (-1, -1, -1))
        if previous == first[2] and len(corners) > 1:
            corners = corners[1:]
        outlines.append(np.array([*corners, corners[0]], dtype=np.float64))
    return outlines
