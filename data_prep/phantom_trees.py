"""The branching structures of the phantom's lungs: vessels grown towards random end points, and the bronchi down to
the segments.

The vessel radii follow the sum rule of Murray (PNAS 1926) with exponent 2.4: r_parent^2.4 = sum of r_child^2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_prep.phantom_body import PatientBody, chest_fields

__all__ = ["Branch", "bronchial_tree", "lung_points", "vascular_tree"]

_TERMINAL_RADIUS_MM = 1.0
_RADIUS_EXPONENT = 2.4
_NUM_ENDS_PER_LOBE = {1: 100, 2: 100, 3: 90, 4: 55, 5: 105}
_NUM_SEGMENTS = {1: 5, 2: 5, 3: 4, 4: 3, 5: 6}


@dataclass(frozen=True)
class Branch:
    """One piece of a tree, positions and radii in mm.

    Args:
        points: (N, 3) polyline.
        radius: of the lumen (bronchus) or of the whole (vessel), at the first and last point.
        lobe: region index 1 to 5 of the lobe it serves, 0 for the central airways.
        generation: 0 trachea, 1 main, 2 lobar, 3 segmental bronchi; for vessels 0.
    """

    points: np.ndarray
    radius: tuple[float, float]
    lobe: int
    generation: int = 0


def lung_points(body: PatientBody, rng: np.random.Generator, lobe: int, num: int, depth_mm: float) -> np.ndarray:
    """Draw `num` positions (num, 3) inside a lobe, at least `depth_mm` from its surface where it is that thick."""
    half = np.array([body.half_width_mm, body.half_depth_mm, 140.0 * body.stretch[2]])
    points = rng.uniform(-half, half, size=(12000, 3)).astype(np.float32)
    fields = chest_fields(body, points[:, 0], points[:, 1], points[:, 2])
    depth = np.where(fields.lobe == lobe, np.minimum(fields.lung, fields.fissure), -1.0)
    for wanted in (depth_mm, depth_mm / 2, 2.0, 0.0):
        chosen = points[depth > wanted]
        if len(chosen) >= max(num, 5):
            return chosen[:num].astype(float)
    return points[np.argsort(depth)[::-1][:num]].astype(float)


def _hilum(body: PatientBody, lobe: int) -> np.ndarray:
    return body.at((44.0, 6.0, 0.0) if lobe in (1, 2) else (-40.0, 4.0, 0.0))[0]


@lru_cache(maxsize=4)
def vascular_tree(body: PatientBody) -> tuple[Branch, ...]:
    """Grow the pulmonary vessels of all five lobes from the hila."""
    rng = np.random.default_rng([body.seed, 2])
    branches: list[Branch] = []
    for lobe, num_ends in _NUM_ENDS_PER_LOBE.items():
        root = _hilum(body, lobe)
        ends = lung_points(body, rng, lobe, num_ends, 5.0)
        ends = ends[np.argsort(np.linalg.norm(ends - root, axis=1))]
        nodes, parents = [root], [-1]
        for end in ends:
            tree = np.asarray(nodes)
            # A branch leaves where the way is short, and rather near the hilum than from a far twig.
            cost = np.linalg.norm(tree - end, axis=1) + 0.45 * np.linalg.norm(tree - root, axis=1)
            parent = int(np.argmin(cost))
            nodes.append(end)
            parents.append(parent)
        flow = np.zeros(len(nodes))
        for n in range(len(nodes) - 1, 0, -1):
            flow[n] = flow[n] or 1.0
            flow[parents[n]] += flow[n]
        radius = np.minimum(_TERMINAL_RADIUS_MM * flow ** (1 / _RADIUS_EXPONENT), 6.5)
        for n in range(1, len(nodes)):
            points = np.stack([nodes[parents[n]], nodes[n]])
            branches.append(Branch(points, (float(radius[n]) * 1.1, float(radius[n]) * 0.9), lobe))
    return tuple(branches)


@lru_cache(maxsize=4)
def bronchial_tree(body: PatientBody) -> tuple[Branch, ...]:
    """Return trachea, main, lobar and segmental bronchi; the radius is the lumen's."""
    rng = np.random.default_rng([body.seed, 3])
    size = body.size

    def branch(lobe: int, generation: int, radius: tuple[float, float], *points: tuple[float, float, float]) -> Branch:
        return Branch(body.at(*points), (radius[0] * size, radius[1] * size), lobe, generation)

    tree = [
        branch(0, 0, (8.5, 8.0), (0, 0, 175), (0, -2, 120), (-2, 4, 70), (-1, 10, 28)),
        branch(0, 1, (7.0, 6.2), (-1, 10, 28), (-18, 11, 14), (-30, 11, 4)),
        branch(0, 1, (6.4, 5.6), (-1, 10, 28), (20, 13, 12), (42, 15, 0)),
        branch(0, 1, (5.6, 4.8), (-30, 11, 4), (-36, 13, -16)),
    ]
    lobar = {
        3: ((-22, 11, 11), (-40, 7, 18), (-52, 4, 26)),
        4: ((-36, 12, -14), (-48, -4, -24), (-58, -16, -30)),
        5: ((-36, 13, -16), (-44, 20, -30), (-52, 28, -45)),
        1: ((42, 15, 0), (54, 4, 8), (62, -4, 16)),
        2: ((42, 15, 0), (47, 22, -20), (53, 30, -42)),
    }
    for lobe, path in lobar.items():
        tree.append(branch(lobe, 2, (4.4, 3.4), *path))
        tip = body.at(path[-1])[0]
        ends = lung_points(body, rng, lobe, 120, 12.0)
        away = ends - tip
        length = np.linalg.norm(away, axis=1)
        directions = away[(length > 30) & (length < 90)]
        chosen: list[np.ndarray] = []
        for direction in directions:
            unit = direction / np.linalg.norm(direction)
            if all(float(unit @ other) < 0.85 for other in chosen):
                chosen.append(unit)
                middle = tip + 0.35 * direction + rng.normal(0, 2.0, 3)
                points = np.stack([tip, middle, tip + 0.75 * direction])
                tree.append(Branch(points, (2.3 * size, 1.6 * size), lobe, 3))
            if len(chosen) == _NUM_SEGMENTS[lobe]:
                break
    return tuple(tree)
