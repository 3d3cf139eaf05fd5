"""A thin-slice and a thick-slice scan of one chest give closer features than two chests scanned alike.

Compared are cosine distances of raw features (global, and the mean over regions) of a small untrained encoder: the
largest distance between two samplings of one phantom must stay below the smallest distance between two phantoms that
were sampled alike. Training is not needed for this and could hide that it fails.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from data_prep.phantom import ThoraxPhantom
from vlm3d_ext.data.intensity_windows import apply_window
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_volume, target_geometry
from vlm3d_ext.networks.layers import SineCosinePositionEmbedding
from vlm3d_ext.networks.nets import ThreeDVisionEncoder

PHANTOM_SEEDS = (0, 1, 2, 3)
THICKNESSES_MM = (1.0, 2.5, 5.0)
EXTENT_MM = 320.0
IN_PLANE = 64
HIDDEN_SIZE = 48
SLICES_OF_A_SLAB = 4

Volume = tuple[np.ndarray, VolumeGeometry]
Features = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def scans() -> dict[tuple[int, float], Volume]:
    """(phantom seed, slice thickness in mm) -> HU and grid; every sampling has noise of its own."""
    result = {}
    for seed, thickness in itertools.product(PHANTOM_SEEDS, THICKNESSES_MM):
        size = (round(EXTENT_MM / thickness), IN_PLANE, IN_PLANE)
        spacing = (thickness, EXTENT_MM / IN_PLANE, EXTENT_MM / IN_PLANE)
        sample = ThoraxPhantom(seed).sample(size, spacing, noise_seed=round(10 * thickness))
        result[seed, thickness] = (sample.hu, VolumeGeometry(size, sample.affine_lps))
    return result


@pytest.fixture(params=[0, 1])
def encoder(request) -> ThreeDVisionEncoder:
    torch.manual_seed(request.param)
    return ThreeDVisionEncoder(
        patch_size=(SLICES_OF_A_SLAB, 8, 8),
        hidden_size=HIDDEN_SIZE,
        num_layers=2,
        num_heads=4,
        num_depth_heads=1,
        mlp_dim=96,
    ).eval()


@torch.no_grad()
def features_of(encoder: ThreeDVisionEncoder, hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> Features:
    image = torch.from_numpy(apply_window(hu, "soft_tissue").astype(np.float32) / 255)[None, None]
    features = encoder(image, spacing_mm=torch.tensor([spacing_mm]))
    return {"global": features.global_features[0], "mean over regions": features.region_features[0].mean(0)}


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return 1 - torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0).item()


def largest_and_smallest(features: dict[tuple[int, float], Features], name: str) -> tuple[float, float]:
    """Return the largest distance within a phantom, across thicknesses, and the smallest between phantoms, within a
    thickness."""
    thicknesses = sorted({thickness for _, thickness in features})
    within = [
        distance(features[seed, first][name], features[seed, second][name])
        for seed in PHANTOM_SEEDS
        for first, second in itertools.combinations(thicknesses, 2)
    ]
    between = [
        distance(features[first, thickness][name], features[second, thickness][name])
        for thickness in thicknesses
        for first, second in itertools.combinations(PHANTOM_SEEDS, 2)
    ]
    return max(within), min(between)


def assert_closer_within_than_between(features: dict[tuple[int, float], Features]) -> None:
    for name in ("global", "mean over regions"):
        within, between = largest_and_smallest(features, name)
        assert within < between, f"{name}: up to {within:.2g} within a phantom, from {between:.2g} between two"


def unresampled_features(encoder, scans, *thicknesses: float) -> dict[tuple[int, float], Features]:
    return {
        key: features_of(encoder, hu, geometry.spacing_mm)
        for key, (hu, geometry) in scans.items()
        if key[1] in thicknesses
    }


def test_resampled_scans_of_one_chest_agree(encoder, scans):
    """1 mm, 2.5 mm and 5 mm slices, brought to 16 slices by the policy "resample" as the preparation does it."""
    features = {}
    for key, (hu, geometry) in scans.items():
        (target,) = target_geometry(geometry, (16, IN_PLANE, IN_PLANE), "resample")
        features[key] = features_of(encoder, resample_volume(hu, geometry, target), target.spacing_mm)
    assert_closer_within_than_between(features)


def test_unresampled_scans_of_one_chest_agree(encoder, scans):
    """320 slices of 1 mm, 128 of 2.5 mm, 64 of 5 mm: only positions in millimetres say that all are one chest."""
    features = unresampled_features(encoder, scans, *THICKNESSES_MM)
    assert_closer_within_than_between(features)

    for seed in PHANTOM_SEEDS:
        hu, geometry = scans[seed, 2.5]
        features[seed, 2.5] = features_of(encoder, hu, (1.0, *geometry.spacing_mm[1:]))
    for name in ("global", "mean over regions"):
        within, between = largest_and_smallest(features, name)
        assert within > between, f"{name}: a wrong spacing makes no difference"


def test_a_wave_shorter_than_two_slabs_would_tell_thin_from_thick(encoder, scans):
    """Why the shortest wave is what it is: one of 20 mm has the same phase at all slabs of 4 x 5 mm, while over thin
    slabs it averages to zero, and a chest in thick slices would look like another chest."""
    slab_mm = SLICES_OF_A_SLAB * 5.0
    encoder.position_embedding = SineCosinePositionEmbedding(HIDDEN_SIZE, shortest_wavelength_mm=slab_mm)
    features = unresampled_features(encoder, scans, 1.0, 5.0)
    within, between = largest_and_smallest(features, "global")
    assert within > between
