"""A phantom's record says the same of its lesions as its masks do."""

import math

import numpy as np
import pytest

from data_prep.finding_locations import lesion_location_of_finding, lesion_locations_of_findings
from data_prep.finding_record import DRAWN_LESIONS, FINDING_PREVALENCE, Finding
from data_prep.phantom import ThoraxPhantom
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from vlm3d_ext.data.anatomical_regions import totalsegmentator_lookup_table
from vlm3d_ext.text.lesion_locations import LesionLocationInjector

NODULES = Finding(
    "lung_nodule",
    "bilateral",
    ("right_upper_lobe", "left_lower_lobe"),
    12.4,
    geometry={"centres": np.zeros((2, 3)), "radii": np.array([6.2, 3.5]), "lobes": [3, 2]},
)


def patch(key, lobe, region, radius=20.0):
    geometry = {"centres": np.zeros((1, 3)), "radii": np.full((1, 3), radius), "lobes": [lobe]}
    return Finding(key, region.split("_")[0], (region,), 2 * radius, geometry=geometry)


def test_wording():
    effusion = lesion_location_of_finding(Finding("pleural_effusion", "right", ("pleura",), 15.0, "small"))
    assert effusion.sentence() == "[FINDING] Pleural effusion detected in right lower posterior region, small"
    fluid = lesion_location_of_finding(Finding("pericardial_effusion", "", ("heart",), 22.0, "large"))
    assert fluid.sentence() == "[FINDING] Pericardial effusion detected in heart region, large"
    nodules = lesion_location_of_finding(NODULES)
    assert nodules.sentence() == "[FINDING] Lung nodule detected in right upper lobe, 12 mm, and 1 more"


def test_nodules_one_by_one():
    lines = [location.sentence() for location in lesion_locations_of_findings([NODULES])]
    assert lines == [
        "[FINDING] Lung nodule detected in right upper lobe, 12 mm",
        "[FINDING] Lung nodule detected in left lower lobe, 7 mm",
    ]


def test_a_nodule_without_geometry_is_what_its_record_says():
    record = Finding("lung_nodule", "left", ("left_upper_lobe",), 9.0)
    assert lesion_location_of_finding(record).sentence() == "[FINDING] Lung nodule detected in left upper lobe, 9 mm"


@pytest.mark.parametrize("key", sorted(set(FINDING_PREVALENCE) - set(DRAWN_LESIONS)))
def test_what_has_no_mask_of_its_own_has_no_location(key):
    assert lesion_location_of_finding(Finding(key, "", ())) is None


def test_pneumonia_shows_what_it_brings_along():
    locations = lesion_locations_of_findings([patch("pneumonia", 5, "right_lower_lobe")])
    assert [(x.disease, x.side, x.regions) for x in locations] == [
        ("consolidation", "right", ("right_lower_lobe",)),
        ("ground_glass_opacity", "right", ("right_lower_lobe",)),
    ]


def test_consolidation_beside_a_pneumonia_is_one_entry():
    small, large = patch("consolidation", 1, "left_upper_lobe", 15.0), patch("pneumonia", 5, "right_lower_lobe", 30.0)
    both = lesion_locations_of_findings([small, large])[0]
    assert (both.side, both.regions) == ("bilateral", ("right_lower_lobe", "left_upper_lobe"))
    assert both.num_lesions == 2
    alone = [lesion_locations_of_findings([finding])[0].volume_ml for finding in (small, large)]
    assert both.volume_ml == pytest.approx(sum(alone))
    assert alone[1] / alone[0] == pytest.approx((30 / 15) ** 3)


def test_edema_is_large_and_in_both_lungs():
    lobes = ("left_upper_lobe", "left_lower_lobe", "right_upper_lobe", "right_lower_lobe")
    edema = Finding("pulmonary_edema", "bilateral", lobes, pattern="perihilar", geometry={"reach": 60.0, "seed": 1})
    (location,) = lesion_locations_of_findings([edema])
    assert location.sentence() == "[FINDING] Ground-glass opacity detected in both lungs, large"


def test_records_agree_with_masks():
    size, spacing = (40, 80, 84), (8.0, 4.5, 4.3)
    table, injector = totalsegmentator_lookup_table(), LesionLocationInjector()
    agreed = {"side": 0, "regions": 0, "grade": 0, "size": 0, "num": 0}
    for seed in range(15):
        keys = [DRAWN_LESIONS[seed % 5], ("pneumonia", "pulmonary_edema", DRAWN_LESIONS[(seed + 2) % 5])[seed // 5]]
        findings = choose_findings(draw_patient_body(seed), keys, seed, 5.2)
        sample = ThoraxPhantom(seed, findings).sample(size, spacing, noise_hu=0)
        seen = injector.locate(sample.lesion_masks, spacing, table[sample.anatomy])
        recorded = lesion_locations_of_findings(findings)
        for disease in {location.disease for location in recorded}:
            # Of nodules, the largest.
            known = next(location for location in recorded if location.disease == disease)
            first = next(location for location in seen if location.disease == disease)
            agreed["num"] += 1
            agreed["side"] += first.side == known.side
            agreed["regions"] += first.regions[0] in known.regions
            agreed["grade"] += first.grade == known.grade
            agreed["size"] += known.size_mm is None or math.isclose(first.size_mm, known.size_mm, abs_tol=4.5)
    assert agreed["num"] >= 25
    for what, share in (("side", 0.9), ("regions", 0.9), ("size", 0.9), ("grade", 0.65)):
        assert agreed[what] >= share * agreed["num"], (what, agreed)
