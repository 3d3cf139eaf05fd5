from collections import Counter

import numpy as np
import pytest

from vlm3d_ext.data.anatomical_regions import (
    ANATOMICAL_REGIONS,
    LUNG_REGION_INDICES,
    NUM_REGIONS,
    PLEURA_REGION_INDEX,
    region_by_name,
    region_of_totalsegmentator_class,
    totalsegmentator_lookup_table,
)


def test_twenty_regions_numbered_from_one():
    assert NUM_REGIONS == 20
    assert [region.index for region in ANATOMICAL_REGIONS] == list(range(1, 21))
    assert len({region.name for region in ANATOMICAL_REGIONS}) == 20
    assert len({region.label for region in ANATOMICAL_REGIONS}) == 20


def test_every_class_belongs_to_one_region_at_most():
    ids = Counter(class_id for region in ANATOMICAL_REGIONS for class_id in region.totalsegmentator)
    names = Counter(
        name
        for region in ANATOMICAL_REGIONS
        for name in (*region.totalsegmentator.values(), *region.totalsegmentator_v1_names)
    )
    assert set(ids.values()) == {1} and set(names.values()) == {1}


# TotalSegmentator v2, task "total": class id, class name, our region
CLASSES = [
    (1, "spleen", 20),
    (5, "liver", 20),
    (10, "lung_upper_lobe_left", 1),
    (13, "lung_middle_lobe_right", 4),
    (14, "lung_lower_lobe_right", 5),
    (15, "esophagus", 12),
    (16, "trachea", 6),
    (17, "thyroid_gland", 13),
    (32, "vertebrae_T12", 14),
    (43, "vertebrae_T1", 14),
    (51, "heart", 7),
    (52, "aorta", 8),
    (53, "pulmonary_vein", 9),
    (54, "brachiocephalic_trunk", 11),
    (60, "brachiocephalic_vein_right", 11),
    (61, "atrial_appendage_left", 7),
    (62, "superior_vena_cava", 10),
    (69, "humerus_left", 18),
    (74, "clavicula_right", 18),
    (79, "spinal_cord", 14),
    (92, "rib_left_1", 15),
    (103, "rib_left_12", 15),
    (104, "rib_right_1", 16),
    (115, "rib_right_12", 16),
    (116, "sternum", 17),
    (117, "costal_cartilages", 17),
]


@pytest.mark.parametrize(("class_id", "name", "region"), CLASSES)
def test_class_by_id_and_by_name(class_id, name, region):
    assert totalsegmentator_lookup_table()[class_id] == region
    assert region_of_totalsegmentator_class(name) == region
    assert ANATOMICAL_REGIONS[region - 1].totalsegmentator[class_id] == name


def test_classes_outside_the_chest_are_background():
    """Lumbar and cervical spine, bowel, hips, muscles and the brain."""
    table = totalsegmentator_lookup_table()
    assert table.shape == (118,) and table.dtype == np.uint8
    outside = [0, 18, 20, 25, 27, 31, 44, 50, 63, 68, 75, 80, 90, 91]
    assert (table[outside] == 0).all()
    assert region_of_totalsegmentator_class("vertebrae_L1") == 0
    assert region_of_totalsegmentator_class("brain") == 0


def test_regions_hold_as_many_classes_as_the_body_has():
    sizes = np.bincount(totalsegmentator_lookup_table(), minlength=21)
    assert sizes[15] == sizes[16] == 12  # ribs
    assert sizes[14] == 13  # twelve thoracic vertebrae and the cord
    assert sizes[PLEURA_REGION_INDEX] == 0  # derived, not segmented
    assert [sizes[index] for index in LUNG_REGION_INDICES] == [1] * 5


def test_names_of_the_first_release():
    for part in ("myocardium", "atrium_left", "ventricle_left", "atrium_right", "ventricle_right"):
        assert region_of_totalsegmentator_class(f"heart_{part}") == region_by_name("heart").index
    assert region_of_totalsegmentator_class("pulmonary_artery") == 9


def test_region_by_name():
    for region in ANATOMICAL_REGIONS:
        assert region_by_name(region.name) is region
    with pytest.raises(ValueError, match=r"'lingula'.*left_upper_lobe"):
        region_by_name("lingula")
