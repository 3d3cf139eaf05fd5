from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS, totalsegmentator_lookup_table
from vlm3d_ext.data.totalsegmentator_classes import region_lookup_table, totalsegmentator_class_names

EXAMPLE = Path(__file__).parents[3] / "shared/data/ct_organs_totalsegmentator/example_seg.nii.gz"


def test_version_2_agrees_with_the_table_of_regions():
    np.testing.assert_array_equal(region_lookup_table(2), totalsegmentator_lookup_table())
    for region in ANATOMICAL_REGIONS:
        for class_id, name in region.totalsegmentator.items():
            assert totalsegmentator_class_names(2)[class_id] == name


@pytest.mark.parametrize(
    ("class_id", "name", "region"),
    [
        (1, "spleen", 20),
        (7, "aorta", 8),
        (13, "lung_upper_lobe_left", 1),
        (17, "lung_lower_lobe_right", 5),
        (23, "vertebrae_T12", 14),
        (34, "vertebrae_T1", 14),
        (35, "vertebrae_C7", 0),
        (42, "esophagus", 12),
        (44, "heart_myocardium", 7),
        (49, "pulmonary_artery", 9),
        (58, "rib_left_1", 15),
        (81, "rib_right_12", 16),
        (86, "clavicula_left", 18),
        (93, "face", 0),
        (104, "urinary_bladder", 0),
    ],
)
def test_version_1_classes(class_id, name, region):
    assert totalsegmentator_class_names(1)[class_id] == name
    assert region_lookup_table(1)[class_id] == region


def test_every_name_of_the_region_table_is_a_class_of_a_release():
    names = {name for version in (1, 2) for name in totalsegmentator_class_names(version).values()}

    assert {name for region in ANATOMICAL_REGIONS for name in region.totalsegmentator_v1_names} <= names


def test_unknown_version():
    with pytest.raises(ValueError, match="1 or 2, got 3"):
        totalsegmentator_class_names(3)


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the shared sample data are not there")
def test_version_2_agrees_with_a_real_file():
    from data_prep.anatomical_masks import label_names

    assert label_names(EXAMPLE) == totalsegmentator_class_names(2)
    assert np.asarray(nib.load(EXAMPLE).dataobj).max() == 117
