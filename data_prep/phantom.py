"""A thorax phantom: an analytic chest in millimetres that can be sampled on any grid, in HU, with anatomy and lesion
masks.

The phantom knows no voxels. Sampled at 1 mm and at 5 mm it shows the same chest; only noise and the partial volume
effect differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, label

from data_prep.finding_record import DRAWN_LESIONS, Finding
from data_prep.phantom_body import PatientBody, chest_fields, draw_patient_body
from data_prep.phantom_bones import paint_bones
from data_prep.phantom_diffuse_findings import bronchial_changes
from data_prep.phantom_findings import paint_stage, shape_body
from data_prep.phantom_organs import (
    paint_abdomen,
    paint_airways,
    paint_chest_wall,
    paint_lungs,
    paint_mediastinum,
    paint_pulmonary_vessels,
)
from data_prep.phantom_scene import Scene
from data_prep.phantom_shapes import Canvas

__all__ = ["PhantomSample", "ThoraxPhantom", "centred_affine"]

# Enough for one demo volume at once; larger grids are painted in slabs to bound the memory.
_VOXELS_PER_BLOCK = 3_000_000
_COHERENT_LESIONS = ("pericardial_effusion", "pleural_effusion", "consolidation", "ground_glass_opacity")
_SPECK_SHARE = 0.03  # of the largest part; a second patch or the other side's effusion is larger by far
_HU_RANGE = (-1024.0, 3071.0)
_CLASSES_THAT_HOLD_LESIONS = (0, 10, 11, 12, 13, 14)
"""TotalSegmentator's background (effusions) and the five lobes."""


@dataclass(frozen=True)
class PhantomSample:
    """A phantom on a grid.

    Args:
        hu: (D, H, W) float32, HU, with noise.
        anatomy: (D, H, W) uint8, TotalSegmentator v2 class ids, 0 is background.
        lesion_masks: disease key -> (D, H, W) bool, only diseases that have a voxel.
        part_voxels: (finding key, part) -> number of voxels, for findings made of countable parts.
        affine_lps: (4, 4), index column (i, j, k, 1) -> LPS mm.
    """

    hu: np.ndarray
    anatomy: np.ndarray
    lesion_masks: dict[str, np.ndarray]
    part_voxels: dict[tuple[str, int], int]
    affine_lps: np.ndarray


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Return a mask without the specks that organs painted over a lesion leave of it, which nobody would draw."""
    parts, count = label(mask, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    kept = np.concatenate([[False], sizes >= _SPECK_SHARE * sizes.max()])
    return kept[parts]


def centred_affine(size: Sequence[int], spacing_mm: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the (4, 4) LPS affine of an unrotated grid whose middle is the origin.

    Args:
        size: (D, H, W).
        spacing_mm: (z, y, x).
    """
    steps = np.asarray(spacing_mm, dtype=float)[::-1]
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = -steps * (np.asarray(size, dtype=float)[::-1] - 1) / 2
    return affine


class ThoraxPhantom:
    """The chest of one patient at one time.

    Args:
        seed: seed of the patient; the same seed is the same person.
        findings: what is wrong, as `choose_findings` places it.

    Example:
        >>> phantom = ThoraxPhantom(7)
        >>> thick = phantom.sample((64, 128, 128), (5.0, 2.8, 2.8))
    """

    def __init__(self, seed: int, findings: Sequence[Finding] = ()) -> None:
        self.seed = seed
        self.findings = tuple(findings)
        self.body: PatientBody = shape_body(draw_patient_body(seed), self.findings)

    def sample(
        self,
        size: Sequence[int],
        spacing_mm: Sequence[float],
        affine_lps: np.ndarray | None = None,
        noise_hu: float = 18.0,
        noise_smoothness_mm: float = 1.2,
        noise_seed: int = 0,
    ) -> PhantomSample:
        """Sample the phantom at the voxel centres of a grid.

        Args:
            size: (D, H, W).
            spacing_mm: (z, y, x), used where `affine_lps` is None and for the width of soft edges.
            affine_lps: (4, 4) grid; None puts the middle of the grid at the origin.
            noise_hu: standard deviation of the noise in HU; 0 for none.
            noise_smoothness_mm: correlation length of the noise: small for a sharp kernel, large for a soft one.
            noise_seed: seed of the noise.

        Raises:
            ValueError: if size or spacing is not three positive numbers.
        """
        size = tuple(int(n) for n in size)
        spacing = np.asarray(spacing_mm, dtype=float)
        if len(size) != 3 or min(size) < 1 or spacing.shape != (3,) or spacing.min() <= 0:
            raise ValueError(f"size and spacing_mm must be three positive numbers each, got {size} and {spacing_mm}.")
        affine = centred_affine(size, spacing) if affine_lps is None else np.asarray(affine_lps, dtype=float)
        slices = max(1, _VOXELS_PER_BLOCK // (size[1] * size[2]))
        blocks = [
            self._paint_block(affine, size, first, min(first + slices, size[0]), spacing)
            for first in range(0, size[0], slices)
        ]
        hu = np.concatenate([block.hu for block in blocks])
        anatomy = np.concatenate([block.anatomy for block in blocks])
        masks = {}
        for key in DRAWN_LESIONS:
            pieces = [block.lesion_masks.get(key, np.zeros(block.hu.shape, dtype=bool)) for block in blocks]
            if any(piece.any() for piece in pieces):
                masks[key] = (
                    _without_specks(np.concatenate(pieces)) if key in _COHERENT_LESIONS else np.concatenate(pieces)
                )
        if noise_hu > 0:
            hu += self._noise(size, spacing, noise_hu, noise_smoothness_mm, noise_seed)
        parts: dict[tuple[str, int], int] = {}
        for block in blocks:
            for part, count in block.part_voxels.items():
                parts[part] = parts.get(part, 0) + count
        return PhantomSample(np.clip(hu, *_HU_RANGE, out=hu), anatomy, masks, parts, affine)

    def _paint_block(
        self, affine: np.ndarray, size: tuple[int, ...], first: int, last: int, spacing: np.ndarray
    ) -> Canvas:
        body_from_lps = np.eye(4)
        body_from_lps[:3, :3] = self.body.rotation().T
        body_from_lps[:3, 3] = -self.body.rotation().T @ np.asarray(self.body.offset_mm)
        body_from_index = body_from_lps @ affine
        k = np.arange(last - first, dtype=np.float32)[:, None, None] + first
        j = np.arange(size[1], dtype=np.float32)[None, :, None]
        i = np.arange(size[2], dtype=np.float32)[None, None, :]
        m = body_from_index.astype(np.float32)
        x, y, z = (m[n, 0] * i + m[n, 1] * j + m[n, 2] * k + m[n, 3] for n in range(3))
        index_from_body = np.linalg.inv(body_from_index)
        index_from_body[2, 3] -= first
        # Edges are soft over an in-plane voxel; through the slice they follow from the sampling itself.
        canvas = Canvas(x, y, z, index_from_body, float(max(np.sqrt(spacing[1] * spacing[2]), 0.8)))
        scene = Scene(canvas, self.body, chest_fields(self.body, x, y, z), self.findings)
        paint_chest_wall(scene)
        paint_abdomen(scene)
        paint_stage(scene, "pleura")
        paint_lungs(scene)
        paint_pulmonary_vessels(scene)
        paint_stage(scene, "diffuse")
        paint_stage(scene, "focal")
        paint_airways(scene, *bronchial_changes(self.findings))
        paint_mediastinum(scene)
        paint_stage(scene, "mediastinum")
        paint_bones(scene)
        paint_stage(scene, "skeleton")
        # An organ painted later covers a lesion, such as the aorta beside an effusion.
        uncovered = np.isin(canvas.anatomy, _CLASSES_THAT_HOLD_LESIONS)
        for mask in canvas.lesion_masks.values():
            mask &= uncovered
        return canvas

    def _noise(
        self, size: tuple[int, ...], spacing: np.ndarray, noise_hu: float, smoothness_mm: float, noise_seed: int
    ) -> np.ndarray:
        rng = np.random.default_rng([self.seed, noise_seed, 5])
        noise = rng.standard_normal(size, dtype=np.float32)
        sigma = 0.5 * smoothness_mm / spacing[1:]
        if sigma.max() > 0.2:
            noise = gaussian_filter(noise, (0.0, *sigma), truncate=3.0)
        return noise * np.float32(noise_hu / max(float(noise.std()), 1e-6))
