"""Boxes at known places of a synthetic lobe map, and phantoms, whose records say where their lesions are."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_prep.finding_record import DRAWN_LESIONS
from data_prep.phantom import ThoraxPhantom
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from vlm3d_ext.data.anatomical_regions import totalsegmentator_lookup_table
from vlm3d_ext.data.chest_map import ChestMap, in_plane_diameter_mm
from vlm3d_ext.text.lesion_locations import (
    GRADE_VOLUMES_ML,
    LesionLocation,
    LesionLocationInjector,
    grade_of_volume,
)

SHAPE, SPACING = (31, 42, 63), (5.0, 3.0, 2.0)
LEFT_UPPER, LEFT_LOWER, RIGHT_UPPER, RIGHT_MIDDLE, RIGHT_LOWER, SPINE = 1, 2, 3, 4, 5, 14
MIRRORED_REGION = np.arange(21)
MIRRORED_REGION[[1, 2, 3, 5, 15, 16]] = [3, 5, 1, 2, 16, 15]
VOXEL_ML = 0.03


def lobe_map():
    """The right lung at low i, the left at high i; lower lobes below, spine between them at the back."""
    regions = np.zeros(SHAPE, dtype=np.uint8)
    right, left = slice(4, 27), slice(36, 59)
    regions[2:14, 4:38, right] = RIGHT_LOWER
    regions[14:18, 4:38, right] = RIGHT_MIDDLE
    regions[18:29, 4:38, right] = RIGHT_UPPER
    regions[2:16, 4:38, left] = LEFT_LOWER
    regions[16:29, 4:38, left] = LEFT_UPPER
    regions[:, 34:41, 29:34] = SPINE
    return regions


def box(k, j, i):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[slice(*k), slice(*j), slice(*i)] = True
    return mask


def locate(key, mask, regions=None, **settings):
    return LesionLocationInjector(**settings).locate({key: mask}, SPACING, regions)


def test_a_nodule_has_lobe_and_millimetres():
    (nodule,) = locate("lung_nodule", box((20, 22), (10, 14), (6, 11)), lobe_map())
    assert (nodule.side, nodule.regions, nodule.num_lesions) == ("right", ("right_upper_lobe",), 1)
    # Centres lie 4 steps of 2 mm and 3 of 3 mm apart; the voxel reaches further along that diagonal.
    between = np.array([3 * 3.0, 4 * 2.0])
    reach = between / np.linalg.norm(between) * [3.0, 2.0]
    assert nodule.size_mm == pytest.approx(np.linalg.norm(between) + np.linalg.norm(reach))
    assert nodule.volume_ml == pytest.approx(2 * 4 * 5 * VOXEL_ML)
    assert nodule.sentence() == "[FINDING] Lung nodule detected in right upper lobe, 15 mm"
    assert nodule.grade == ""


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 1, 7), 14.0), ((1, 5, 1), 15.0), ((9, 1, 1), 3.0), ((3, 1, 2), 4.0)],
)
def test_rows_of_voxels_are_as_long_as_their_steps_in_the_slice(shape, expected):
    assert in_plane_diameter_mm(np.ones(shape, dtype=bool), SPACING) == pytest.approx(expected)


def test_the_diameter_of_a_ball_is_right_to_a_step():
    spacing = (2.5, 0.7, 1.1)
    k, j, i = (np.arange(n) * step for n, step in zip((21, 61, 43), spacing, strict=True))
    distance = np.sqrt((k[:, None, None] - 25) ** 2 + (j[:, None] - 21) ** 2 + (i - 22) ** 2)
    for diameter in (9.0, 17.3, 28.0):
        measured = in_plane_diameter_mm(distance <= diameter / 2, spacing)
        assert diameter - 0.5 < measured < diameter + 1.1


def test_the_slow_way_gives_the_same_diameter():
    rng = np.random.default_rng(3)
    mask = rng.random((3, 9, 11)) < 0.15
    steps = np.array(SPACING[1:])
    slow = 0.0
    for plane in mask:
        for a in np.argwhere(plane):
            for b in np.argwhere(plane):
                offset = (a - b) * steps
                length = np.linalg.norm(offset)
                reach = np.linalg.norm(offset / length * steps) if length else steps.max()
                slow = max(slow, length + reach)
    assert in_plane_diameter_mm(mask, SPACING) == pytest.approx(slow)


def test_effusion_beside_the_lung_goes_to_the_nearest_side_with_its_place():
    fluid = box((0, 8), (36, 41), (40, 58))
    (found,) = locate("pleural_effusion", fluid, lobe_map())
    assert (found.side, found.regions, found.position) == ("left", ("pleura",), ("lower", "posterior"))
    assert found.sentence() == "[FINDING] Pleural effusion detected in left lower posterior region, small"


def test_fluid_over_the_middle_of_the_volume_belongs_to_the_lung_it_is_next_to():
    regions = np.roll(lobe_map(), 9, axis=2)  # the patient lies off the centre of the scan
    fluid = np.roll(box((2, 8), (38, 41), (18, 27)), 9, axis=2)
    fluid[:, :, :30] = False
    assert fluid.any() and np.nonzero(fluid)[2].min() < SHAPE[2] // 2 <= np.nonzero(fluid)[2].max() + 5
    (found,) = locate("pleural_effusion", fluid, regions)
    assert found.side == "right"


def test_both_sides_make_one_bilateral_entry_graded_by_the_larger():
    # 12 * 5 * 12 voxels are 21.6 ml on the right, half of it on the left.
    fluid = box((2, 14), (36, 41), (10, 22)) | box((2, 8), (36, 41), (40, 52))
    right_ml = 12 * 5 * 12 * VOXEL_ML
    for thresholds, grade in (((10.0, right_ml * 1.2), "moderate"), ((right_ml * 1.2, 90.0), "small")):
        (found,) = locate("pleural_effusion", fluid, lobe_map(), grade_volumes_ml={"pleural_effusion": thresholds})
        assert (found.side, found.num_lesions, found.grade) == ("bilateral", 2, grade)
    assert found.volume_ml == pytest.approx(1.5 * right_ml)


def test_a_speck_on_the_other_side_makes_nothing_bilateral():
    fluid = box((2, 14), (36, 41), (10, 22)) | box((2, 3), (36, 39), (40, 43))
    (found,) = locate("pleural_effusion", fluid, lobe_map())
    assert found.side == "right"


def test_lobes_come_by_overlap_and_slivers_are_left_out():
    opacity = box((10, 16), (10, 20), (6, 16))  # 4 slices in the lower lobe, 2 in the middle one
    (found,) = locate("consolidation", opacity, lobe_map())
    assert found.regions == ("right_lower_lobe", "right_middle_lobe")
    assert found.sentence().startswith("[FINDING] Consolidation detected in right lower lobe and right middle lobe, ")
    sliver = box((2, 15), (10, 20), (6, 16))  # 1 slice of 13
    assert locate("consolidation", sliver, lobe_map())[0].regions == ("right_lower_lobe",)


def test_consolidated_lung_outside_every_lobe_counts_to_the_nearest():
    regions = lobe_map()
    opacity = box((4, 8), (20, 38), (36, 59))
    regions[opacity] = 0
    (found,) = locate("consolidation", opacity, regions)
    assert (found.side, found.regions) == ("left", ("left_lower_lobe",))


def test_four_lobes_are_both_lungs():
    (found,) = locate("ground_glass_opacity", (lobe_map() > 0) & (lobe_map() < 6), lobe_map())
    assert len(found.regions) >= 4 and found.side == "bilateral"
    assert found.sentence().startswith("[FINDING] Ground-glass opacity detected in both lungs, ")


def test_pericardial_effusion_has_no_side():
    (found,) = locate("pericardial_effusion", box((5, 12), (15, 25), (27, 42)), lobe_map())
    assert (found.side, found.position, found.regions) == ("", (), ("heart",))
    assert found.sentence() == "[FINDING] Pericardial effusion detected in heart region, small"


def test_without_an_anatomical_mask_the_middle_of_the_volume_decides():
    (nodule,) = locate("lung_nodule", box((25, 28), (3, 7), (40, 44)))
    assert (nodule.side, nodule.regions, nodule.position) == ("left", (), ("upper", "anterior"))
    assert (
        nodule.sentence() == "[FINDING] Lung nodule detected in left upper anterior region, 14 mm"
    )  # 13.5: see the first test
    (fluid,) = locate("pleural_effusion", box((2, 6), (30, 40), (4, 60)))
    assert fluid.sentence() == "[FINDING] Pleural effusion detected in bilateral lower posterior regions, small"
    assert replace(fluid, position=()).sentence() == "[FINDING] Pleural effusion detected on both sides, small"


def test_an_empty_anatomical_mask_is_none():
    mask = box((25, 28), (3, 7), (40, 44))
    assert locate("lung_nodule", mask, np.zeros(SHAPE, dtype=np.uint8)) == locate("lung_nodule", mask)


def test_with_one_lung_gone_the_spine_is_the_mid_line():
    regions = np.roll(lobe_map(), 9, axis=2)
    regions[np.isin(regions, (LEFT_UPPER, LEFT_LOWER))] = 0
    assert abs(ChestMap(SHAPE, SPACING, regions).midline_vox - 40) <= 1
    fluid = np.roll(box((2, 28), (4, 38), (36, 54)), 9, axis=2)
    assert locate("pleural_effusion", fluid, regions)[0].side == "left"


@pytest.mark.parametrize("with_regions", [True, False])
@pytest.mark.parametrize("key", ["lung_nodule", "pleural_effusion", "consolidation"])
def test_a_mirrored_patient_has_mirrored_sides(key, with_regions):
    regions = lobe_map() if with_regions else None
    mask = box((20, 26), (6, 12), (8, 14)) | box((4, 9), (30, 38), (10, 17))
    mirrored = None if regions is None else MIRRORED_REGION[regions[:, :, ::-1]].astype(np.uint8)
    here, there = locate(key, mask, regions), locate(key, mask[:, :, ::-1], mirrored)
    assert [location.side for location in here] == ["right"] * len(here)
    swapped = [
        replace(x, side="right", regions=tuple(name.replace("left", "right") for name in x.regions)) for x in there
    ]
    assert [location.side for location in there] == ["left"] * len(here)
    assert swapped == here


def test_nodules_beyond_the_limit_are_counted_in_the_last():
    mask = np.zeros(SHAPE, dtype=bool)
    for n, k in enumerate(range(3, 27, 4)):
        mask[k : k + 2, 6 : 9 + n, 6:9] = True
    found = locate("lung_nodule", mask, lobe_map(), max_lesions_per_disease=3)
    assert [location.num_lesions for location in found] == [1, 1, 4]
    assert [location.volume_ml for location in found] == sorted((n.volume_ml for n in found), reverse=True)
    assert found[-1].sentence().endswith(" mm, and 3 more")
    assert len(locate("lung_nodule", mask, lobe_map(), max_lesions_per_disease=6)) == 6


def test_specks_are_left_out():
    mask = box((20, 22), (10, 14), (6, 11)) | box((5, 6), (10, 11), (6, 7))
    assert len(locate("lung_nodule", mask)) == 2
    assert len(locate("lung_nodule", mask, minimum_volume_ml={"lung_nodule": 0.05})) == 1
    assert locate("lung_nodule", mask, minimum_volume_ml=5.0) == []


def test_probabilities_are_the_highest_inside():
    mask = box((20, 22), (10, 14), (6, 11)) | box((5, 8), (10, 14), (40, 50))
    probabilities = np.where(mask, 0.5, 0.9).astype(np.float32)
    probabilities[21, 12, 8] = 0.75
    found = LesionLocationInjector().locate({"lung_nodule": mask}, SPACING, None, {"lung_nodule": probabilities})
    assert [location.probability for location in found] == [0.5, 0.75]


def test_lines_in_the_order_of_the_set():
    masks = {"lung_nodule": box((20, 22), (10, 14), (6, 11)), "pericardial_effusion": box((5, 12), (15, 25), (27, 42))}
    injector = LesionLocationInjector()
    lines = injector.inject(injector.locate(masks, SPACING, lobe_map())).split("\n")
    assert [line.split()[1] for line in lines] == ["Pericardial", "Lung"]
    assert injector.inject([]) == "" and injector.locate({}, SPACING) == []
    assert injector.locate({"lung_nodule": np.zeros(SHAPE, dtype=bool)}, SPACING, lobe_map()) == []


def test_json_round_trip():
    for location in locate("lung_nodule", box((20, 22), (10, 14), (6, 11)), lobe_map()):
        assert LesionLocation.from_json(json.loads(json.dumps(location.to_json()))) == location
    with pytest.raises(ValueError, match="regions"):
        LesionLocation.from_json({"disease": "lung_nodule"})


@pytest.mark.parametrize(("volume", "grade"), [(149.9, "small"), (150, "moderate"), (399, "moderate"), (400, "large")])
def test_grades(volume, grade):
    assert grade_of_volume(volume, GRADE_VOLUMES_ML["pericardial_effusion"]) == grade


def test_bad_input_is_named():
    injector, mask = LesionLocationInjector(), box((20, 22), (10, 14), (6, 11))
    with pytest.raises(ValueError, match="'gout'"):
        injector.locate({"gout": mask}, SPACING)
    with pytest.raises(ValueError, match=r"lung_nodule.*\(31, 42, 62\)"):
        injector.locate({"lung_nodule": mask[:, :, 1:]}, SPACING, lobe_map())
    with pytest.raises(ValueError, match="probabilities of lung_nodule"):
        injector.locate({"lung_nodule": mask}, SPACING, None, {"lung_nodule": np.zeros((3, 3, 3))})
    for spacing in ((5.0, 0.0, 2.0), (5.0, float("nan"), 2.0), (1.0, 2.0)):
        with pytest.raises(ValueError, match="spacing_mm"):
            injector.locate({"lung_nodule": mask}, spacing)
    with pytest.raises(ValueError, match="max_lesions_per_disease"):
        LesionLocationInjector(max_lesions_per_disease=0)
    with pytest.raises(ValueError, match="'gout'"):
        LesionLocationInjector(minimum_volume_ml={"gout": 1.0})
    with pytest.raises(ValueError, match="consolidation"):
        LesionLocationInjector(grade_volumes_ml={"consolidation": (50.0, 20.0)})


def test_phantoms_are_located_where_their_records_say():
    size, spacing = (40, 80, 84), (8.0, 4.5, 4.3)
    table, injector = totalsegmentator_lookup_table(), LesionLocationInjector()
    num, sides, lobes = 0, 0, 0
    for seed in range(20):
        keys = {DRAWN_LESIONS[seed % 5], DRAWN_LESIONS[(seed // 5 + seed + 1) % 5]}
        findings = choose_findings(draw_patient_body(seed), sorted(keys), seed, 5.2)
        sample = ThoraxPhantom(seed, findings).sample(size, spacing, noise_hu=0)
        located = injector.locate(sample.lesion_masks, spacing, table[sample.anatomy])
        for finding in findings:
            found = [location for location in located if location.disease == finding.key]
            found_sides = {location.side for location in found}
            num += 1
            sides += finding.side == (found_sides.pop() if len(found_sides) == 1 else "bilateral")
            lobes += {location.regions[0] for location in found} <= set(finding.regions)
    assert num >= 35
    assert sides >= 0.95 * num
    assert lobes >= 0.95 * num
