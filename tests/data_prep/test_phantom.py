"""The thorax phantom: the same chest on every grid, organs where they belong, densities as a CT has them."""

from itertools import pairwise

import numpy as np
import pytest

import data_prep.phantom as phantom_module
from data_prep.phantom import ThoraxPhantom, centred_affine
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from vlm3d_ext.data.anatomical_regions import PLEURA_REGION_INDEX, totalsegmentator_lookup_table

SIZE, SPACING = (40, 60, 64), (8.0, 6.0, 5.6)


@pytest.fixture(scope="module")
def healthy():
    return ThoraxPhantom(11).sample(SIZE, SPACING, noise_hu=0)


def _centroid(mask):
    return np.array([axis.mean() for axis in np.nonzero(mask)])


def _findings(seed, *keys):
    return choose_findings(draw_patient_body(seed), keys, seed)


@pytest.mark.parametrize("keys", [(), ("lung_nodule", "ground_glass_opacity", "interlobular_septal_thickening")])
def test_thin_and_thick_slices_show_the_same_chest(keys):
    phantom = ThoraxPhantom(3, _findings(3, *keys))
    thin = phantom.sample((65, 40, 44), (4.0, 9.0, 8.0), noise_hu=0)
    thick = phantom.sample((13, 40, 44), (20.0, 9.0, 8.0), noise_hu=0)
    # Slice n of the thick grid lies at the height of slice 5n + 2 of the thin one.
    np.testing.assert_allclose(thick.hu, thin.hu[2::5], atol=0.6)
    assert np.mean(thick.anatomy == thin.anatomy[2::5]) > 0.9999


def test_two_patients_differ_more_than_two_grids_of_one():
    first, second = (ThoraxPhantom(seed).sample(SIZE, SPACING, noise_hu=0).hu for seed in (3, 4))
    assert np.mean(np.abs(first - second) > 100) > 0.05


def test_large_grids_are_painted_in_slabs_without_a_seam(monkeypatch):
    phantom = ThoraxPhantom(5, _findings(5, "consolidation", "pleural_effusion", "emphysema"))
    whole = phantom.sample((21, 40, 44), (15.0, 9.0, 8.0))
    monkeypatch.setattr(phantom_module, "_VOXELS_PER_BLOCK", 4 * 40 * 44)
    slabs = phantom.sample((21, 40, 44), (15.0, 9.0, 8.0))
    np.testing.assert_allclose(slabs.hu, whole.hu, atol=0.01)
    np.testing.assert_array_equal(slabs.anatomy, whole.anatomy)
    assert slabs.part_voxels == whole.part_voxels
    assert set(slabs.lesion_masks) == {"consolidation", "pleural_effusion"}
    for key, mask in whole.lesion_masks.items():
        np.testing.assert_array_equal(slabs.lesion_masks[key], mask)


def test_an_affine_moves_the_picture_by_whole_voxels(healthy):
    affine = centred_affine(SIZE, SPACING)
    affine[2, 3] += 3 * SPACING[0]
    moved = ThoraxPhantom(11).sample(SIZE, SPACING, affine, noise_hu=0)
    np.testing.assert_allclose(moved.hu[:-3], healthy.hu[3:], atol=0.6)


def test_centred_affine_has_the_middle_voxel_at_the_origin():
    affine = centred_affine((5, 7, 3), (2.0, 1.5, 4.0))
    np.testing.assert_allclose(affine @ [1, 3, 2, 1], [0, 0, 0, 1])
    np.testing.assert_allclose(affine @ [2, 4, 3, 1], [4.0, 1.5, 2.0, 1])  # i is 4 mm to the left, j 1.5 mm back


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6])
def test_every_region_is_there(seed):
    anatomy = ThoraxPhantom(seed).sample(SIZE, SPACING, noise_hu=0).anatomy
    regions = set(np.unique(totalsegmentator_lookup_table()[anatomy]).tolist())
    assert regions == set(range(21)) - {PLEURA_REGION_INDEX}  # the pleura is derived from the lungs


def test_organs_lie_on_their_sides(healthy):
    place = {label: _centroid(healthy.anatomy == label) for label in (5, 1, 10, 11, 12, 13, 14, 51, 52, 116)}
    k, j, i = 0, 1, 2
    assert place[12][i] < place[10][i] and place[14][i] < place[11][i]  # i grows to the left
    assert place[5][i] < place[1][i]  # liver right, spleen left
    assert place[10][k] > place[11][k] and place[12][k] > place[13][k] > place[14][k] - 8  # k grows upwards
    assert place[116][j] < place[51][j] < place[52][j] + 10  # the sternum is in front (j grows backwards)
    assert place[5][k] < place[51][k] < place[12][k]


def test_ribs_and_vertebrae_are_numbered_from_above(healthy):
    vertebrae = [_centroid(healthy.anatomy == 44 - n)[0] for n in range(2, 12)]
    assert all(upper > lower for upper, lower in pairwise(vertebrae))
    for first in (92, 104):
        ribs = [_centroid(healthy.anatomy == first + n)[0] for n in range(2, 10)]
        assert all(upper > lower for upper, lower in pairwise(ribs))
    assert _centroid(healthy.anatomy == 96)[2] > _centroid(healthy.anatomy == 108)[2]


def test_densities_and_volumes_are_those_of_an_adult(healthy):
    litres_per_voxel = np.prod(SPACING) * 1e-6
    lungs = (healthy.anatomy >= 10) & (healthy.anatomy <= 14)
    assert -920 < np.median(healthy.hu[lungs]) < -760
    assert 2.5 < lungs.sum() * litres_per_voxel < 9
    assert 0.25 < (healthy.anatomy == 51).sum() * litres_per_voxel < 0.9
    assert np.percentile(healthy.hu[healthy.anatomy == 16], 25) < -900  # voxels of 6 mm mix in the wall
    assert np.percentile(healthy.hu[healthy.anatomy == 96], 75) > 250
    assert healthy.hu[:, :3].max() < -900  # air above the patient


def test_noise_has_the_spread_asked_for_and_changes_nothing_else(healthy):
    noisy = ThoraxPhantom(11).sample(SIZE, SPACING, noise_hu=20.0)
    middle = np.abs(healthy.hu) < 900  # away from where HU are clipped
    difference = (noisy.hu - healthy.hu)[middle]
    assert abs(difference.std() - 20.0) < 1.0 and abs(difference.mean()) < 0.5
    np.testing.assert_array_equal(noisy.anatomy, healthy.anatomy)
    again = ThoraxPhantom(11).sample(SIZE, SPACING, noise_hu=20.0)
    np.testing.assert_array_equal(noisy.hu, again.hu)
    other = ThoraxPhantom(11).sample(SIZE, SPACING, noise_hu=20.0, noise_seed=1)
    assert not np.array_equal(noisy.hu, other.hu)


@pytest.mark.parametrize(
    "size, spacing", [((0, 8, 8), (1, 1, 1)), ((8, 8), (1, 1, 1)), ((8, 8, 8), (1, 0, 1)), ((8, 8, 8), (1, 1))]
)
def test_bad_grids_are_refused(size, spacing):
    with pytest.raises(ValueError, match="three positive numbers"):
        ThoraxPhantom(1).sample(size, spacing)
