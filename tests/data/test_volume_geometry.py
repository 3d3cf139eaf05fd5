"""Grids: spacing, directions, reorientation, round trips."""

import itertools
import json
import pickle

import nibabel as nib
import numpy as np
import pytest

from vlm3d_ext.data.volume_geometry import VolumeGeometry


def rotation(degrees_about_z: float, degrees_about_x: float) -> np.ndarray:
    a, b = np.radians([degrees_about_z, degrees_about_x])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z @ about_x


OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = rotation(12, -7) @ np.diag([0.7, 0.8, 2.5])
OBLIQUE[:3, 3] = [-171.3, 22.25, -640.5]

ALL_48_ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(axes, flips, strict=True))
    for axes in itertools.permutations(("RL", "AP", "IS"))
    for flips in itertools.product((0, 1), repeat=3)
]


def oriented_geometry(codes: str, shape_ijk=(5, 7, 11), spacing=(0.7, 0.8, 2.5)) -> VolumeGeometry:
    """A grid whose index axes i, j, k grow towards `codes`, e.g. "RAS"."""
    affine_ras = np.zeros((4, 4))
    affine_ras[3, 3] = 1
    for column, (code, step) in enumerate(zip(codes, spacing, strict=True)):
        row = next(n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine_ras[row, column] = step if code in "RAS" else -step
    affine_ras[:3, 3] = [31.5, -12.25, 400.0]
    return VolumeGeometry.from_ras(shape_ijk[::-1], affine_ras)


def test_spacing_extent_and_codes_of_a_hand_made_grid():
    geometry = VolumeGeometry((60, 201, 204), np.diag([0.977, 0.977, 3.0, 1.0]))
    assert geometry.spacing_mm == (3.0, 0.977, 0.977)
    assert geometry.extent_mm == pytest.approx((180.0, 196.377, 199.308))
    assert geometry.axis_codes == "LPS"
    assert np.array_equal(np.diag(geometry.affine_ras), [-0.977, -0.977, 3.0, 1.0])


def test_positions_take_array_order_and_return_patient_order():
    geometry = VolumeGeometry.from_spacing((4, 5, 6), (3.0, 2.0, 1.0), origin_lps=(10.0, 20.0, 30.0))
    assert geometry.positions_lps(np.array([[1, 2, 3]])).tolist() == [[13.0, 24.0, 33.0]]


@pytest.mark.parametrize("codes", ALL_48_ORIENTATIONS)
def test_every_orientation_becomes_lps_and_back(codes):
    geometry = oriented_geometry(codes)
    assert geometry.axis_codes == codes == "".join(nib.aff2axcodes(geometry.affine_ras))
    canonical = geometry.canonical()
    assert canonical.axis_codes == "LPS"
    array = np.random.default_rng(7).integers(0, 1000, geometry.shape)
    reoriented = geometry.to_canonical(array)
    assert reoriented.shape == canonical.shape
    # The voxel with the largest value is found at one and the same place in the patient.
    before = np.array(np.unravel_index(array.argmax(), array.shape))[None]
    after = np.array(np.unravel_index(reoriented.argmax(), reoriented.shape))[None]
    np.testing.assert_allclose(geometry.positions_lps(before), canonical.positions_lps(after), atol=1e-9)
    assert np.array_equal(geometry.from_canonical(reoriented), array)


def test_canonical_keeps_a_rotation():
    geometry = VolumeGeometry((3, 4, 5), OBLIQUE)
    assert geometry.canonical() == geometry
    flipped = VolumeGeometry((3, 4, 5), OBLIQUE @ np.diag([-1.0, 1.0, -1.0, 1.0]))
    np.testing.assert_allclose(np.abs(flipped.canonical().directions), np.abs(geometry.directions), atol=1e-12)
    assert flipped.canonical().axis_codes == "LPS"


def test_json_and_pickle_round_trips_are_exact():
    geometry = VolumeGeometry((3, 4, 5), OBLIQUE)
    assert VolumeGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    assert pickle.loads(pickle.dumps(geometry)) == geometry
    assert hash(VolumeGeometry((3, 4, 5), OBLIQUE.copy())) == hash(geometry)


def test_is_close_measures_the_farthest_corner():
    geometry = VolumeGeometry.from_spacing((11, 2, 2), (1.0, 1.0, 1.0))
    stretched = VolumeGeometry.from_spacing((11, 2, 2), (1.001, 1.0, 1.0))  # the last slice moves by 0.01 mm
    assert geometry.is_close(stretched, tolerance_mm=0.0101)
    assert not geometry.is_close(stretched, tolerance_mm=0.0099)
    assert not geometry.is_close(VolumeGeometry.from_spacing((10, 2, 2), (1.0, 1.0, 1.0)), tolerance_mm=100)


def test_shear_is_the_cosine_between_axes():
    sheared = np.eye(4)
    sheared[1, 2] = 0.1
    assert VolumeGeometry((2, 2, 2), sheared).largest_axis_cosine == pytest.approx(0.1 / np.sqrt(1.01))
    assert VolumeGeometry((2, 2, 2), OBLIQUE).largest_axis_cosine < 1e-12


def test_a_fine_grid_is_not_called_singular():
    assert VolumeGeometry((2, 2, 2), np.diag([1e-4, 1e-4, 1e-4, 1.0])).spacing_mm == pytest.approx((1e-4,) * 3)


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((2, 2), np.eye(4), "three positive integers"),
        ((2, 0, 2), np.eye(4), "three positive integers"),
        ((2, 2, 2), np.eye(3), "4 x 4"),
        ((2, 2, 2), np.diag([1, 1, np.nan, 1]), "finite"),
        ((2, 2, 2), np.diag([1, 1, 0, 1.0]), "singular"),
        ((2, 2, 2), np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1.0]]), "singular"),
    ],
)
def test_impossible_grids_are_refused(shape, affine, message):
    with pytest.raises(ValueError, match=message):
        VolumeGeometry(shape, affine)


def test_arrays_of_another_shape_are_refused():
    geometry = VolumeGeometry((2, 3, 4), np.eye(4))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 5\)"):
        geometry.to_canonical(np.zeros((2, 3, 5)))
    with pytest.raises(ValueError, match="'affine_lps'"):
        VolumeGeometry.from_dict({"shape": [1, 2, 3]})
