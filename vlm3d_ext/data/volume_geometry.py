"""Where the voxels of a volume lie in the patient.

Arrays are `(D, H, W)` = `[k, j, i]`; world positions are LPS millimetres (x towards the patient's Left, y Posterior, z
Superior). NIfTI's RAS differs by the sign of x and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

__all__ = ["LPS_FROM_RAS", "VolumeGeometry"]

LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns RAS positions into LPS ones, and back: it is its own inverse."""

_LPS_AXIS_CODES = (("R", "L"), ("A", "P"), ("I", "S"))
_IDENTITY_ORIENTATION = np.array([[0, 1], [1, 1], [2, 1]])


@dataclass(frozen=True, eq=False)
class VolumeGeometry:
    """The grid of a volume: its size and the affine from indices to the patient.

    Args:
        shape: `(D, H, W)` = numbers of voxels along k, j, i.
        affine_lps: 4 × 4, float64; maps the index column `(i, j, k, 1)` (note the order: the *last* array axis first)
            to the LPS position of the voxel's centre in mm.

    Raises:
        ValueError: if the shape is not three positive integers, or the affine is not 4 × 4, finite, invertible, with
            last row 0 0 0 1.

    Example:
        >>> geometry = VolumeGeometry((60, 201, 204), np.diag([0.977, 0.977, 3.0, 1.0]))
        >>> geometry.spacing_mm, geometry.axis_codes
        ((3.0, 0.977, 0.977), 'LPS')
    """

    shape: tuple[int, int, int]
    affine_lps: np.ndarray

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(
                f"the shape of a volume must be three positive integers (D, H, W), got {tuple(self.shape)}."
            )
        affine = np.array(self.affine_lps, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.array_equal(affine[3], [0, 0, 0, 1]):
            raise ValueError(f"an affine must be 4 x 4, finite, with last row 0 0 0 1, got {affine.tolist()}.")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # Divided by the axes' lengths, the determinant is a pure angle: a fine grid is not mistaken for a flat one.
        if not lengths.all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
            raise ValueError(f"the affine is singular: its axes do not span space, got {affine[:3, :3].tolist()}.")
        affine += 0.0  # -0.0 becomes 0.0, so that equal geometries have equal JSON
        affine.setflags(write=False)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine_lps", affine)

    @classmethod
    def from_spacing(
        cls,
        shape: tuple[int, int, int],
        spacing_mm: tuple[float, float, float] | list[float],
        origin_lps: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> VolumeGeometry:
        """Return a geometry whose axes are the patient's: spacing `[z, y, x]` in mm, the centre of voxel (0, 0, 0) at
        `origin_lps` (x, y, z)."""
        affine = np.diag([*reversed([float(s) for s in spacing_mm]), 1.0])
        affine[:3, 3] = origin_lps
        return cls(shape, affine)

    @classmethod
    def from_ras(cls, shape: tuple[int, int, int], affine_ras: np.ndarray) -> VolumeGeometry:
        """Return the geometry of a NIfTI affine; `shape` is `(D, H, W)`, NIfTI's own shape reversed."""
        return cls(shape, LPS_FROM_RAS @ np.asarray(affine_ras, dtype=np.float64))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> VolumeGeometry:
        """Return the geometry that `to_dict` described.

        Raises:
            ValueError: if a key is missing or a value is no geometry.
        """
        missing = sorted({"shape", "affine_lps"} - set(content))
        if missing:
            raise ValueError(f"a geometry needs the keys 'shape' and 'affine_lps'; {missing} missing.")
        return cls(tuple(content["shape"]), np.array(content["affine_lps"], dtype=np.float64))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON content; every float comes back exactly."""
        return {"shape": list(self.shape), "affine_lps": self.affine_lps.tolist()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VolumeGeometry):
            return NotImplemented
        return self.shape == other.shape and bool(np.array_equal(self.affine_lps, other.affine_lps))

    def __hash__(self) -> int:
        return hash((self.shape, self.affine_lps.tobytes()))

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along `[z, y, x]` = `[k, j, i]`, in mm."""
        x, y, z = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return float(z), float(y), float(x)

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        """Size from outer voxel edge to outer voxel edge along `[z, y, x]`, in mm."""
        (d, h, w), (z, y, x) = self.shape, self.spacing_mm
        return d * z, h * y, w * x

    @property
    def directions(self) -> np.ndarray:
        """3 × 3; columns are the unit vectors (LPS) along which i, j, k grow."""
        matrix = self.affine_lps[:3, :3]
        return matrix / np.linalg.norm(matrix, axis=0)

    @property
    def affine_ras(self) -> np.ndarray:
        """4 × 4; what NIfTI stores: index column `(i, j, k, 1)` to RAS mm."""
        return LPS_FROM_RAS @ self.affine_lps + 0.0

    @property
    def axis_codes(self) -> str:
        """Directions in which i, j, k grow, to the nearest patient axis: "LPS" for our canonical order, "RAS" for
        NIfTI's usual one."""
        return "".join(_LPS_AXIS_CODES[int(axis)][int(sign > 0)] for axis, sign in io_orientation(self.affine_lps))

    @property
    def largest_axis_cosine(self) -> float:
        """0 where the three axes are at right angles; otherwise the largest |cosine| between two of them (shear)."""
        gram = self.directions.T @ self.directions
        return float(np.abs(gram - np.diag(np.diag(gram))).max())

    def positions_lps(self, indices_kji: np.ndarray) -> np.ndarray:
        """Return the LPS positions (N, 3) = (x, y, z) in mm of array indices (N, 3) = (k, j, i), which may be
        fractional."""
        return np.asarray(indices_kji, dtype=np.float64)[:, ::-1] @ self.affine_lps[:3, :3].T + self.affine_lps[:3, 3]

    def is_close(self, other: VolumeGeometry, tolerance_mm: float = 0.01) -> bool:
        """Whether both grids have one shape and no voxel centre lies more than `tolerance_mm` from its counterpart.

        An affine map moves no inner voxel further than a corner, so the eight corners decide.
        """
        if self.shape != other.shape:
            return False
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape])).reshape(3, -1).T
        offsets = self.positions_lps(corners) - other.positions_lps(corners)
        return bool(np.linalg.norm(offsets, axis=1).max() <= tolerance_mm)

    def canonical(self) -> VolumeGeometry:
        """Return this grid with its axes permuted and flipped to LPS; voxels stay where they are, a rotation stays in
        the affine."""
        orientation = io_orientation(self.affine_lps)
        shape_ijk = self.shape[::-1]
        shape = [0, 0, 0]
        for length, (axis, _) in zip(shape_ijk, orientation, strict=True):
            shape[int(axis)] = length
        return VolumeGeometry((shape[2], shape[1], shape[0]), self.affine_lps @ inv_ornt_aff(orientation, shape_ijk))

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """Return an array on this grid, axes permuted and flipped to those of `canonical()`; a view, not a copy.

        Raises:
            ValueError: if the array's shape is not this grid's.
        """
        self._check_shape(array, self.shape)
        return apply_orientation(array.T, io_orientation(self.affine_lps)).T

    def from_canonical(self, array: np.ndarray) -> np.ndarray:
        """Return an array on `canonical()` in this grid's own axis order; a view, the inverse of `to_canonical`.

        Raises:
            ValueError: if the array's shape is not that of `canonical()`.
        """
        self._check_shape(array, self.canonical().shape)
        back = ornt_transform(_IDENTITY_ORIENTATION, io_orientation(self.affine_lps))
        return apply_orientation(array.T, back).T

    @staticmethod
    def _check_shape(array: np.ndarray, shape: tuple[int, int, int]) -> None:
        if array.shape != shape:
            raise ValueError(f"the array has shape {array.shape}, but its grid has {shape}.")
