"""Each finding shows in the picture, where and as large as its record says; labels follow from the findings."""

import numpy as np
import pytest
from scipy.ndimage import label

from data_prep.finding_record import (
    CT_RATE_18,
    DRAWN_LESIONS,
    FINDING_PREVALENCE,
    VLM3D_18,
    Finding,
    ct_rate_labels,
    vlm3d_labels,
)
from data_prep.phantom import ThoraxPhantom, _without_specks
from data_prep.phantom_body import draw_patient_body
from data_prep.phantom_findings import choose_findings
from data_prep.phantom_lung_findings import keep_parts
from data_prep.phantom_trees import lung_points

SIZE, SPACING = (40, 80, 80), (8.0, 4.5, 4.5)
SEED = 21


@pytest.fixture(scope="module")
def healthy():
    return ThoraxPhantom(SEED).sample(SIZE, SPACING, noise_hu=0)


def _choose(*keys, seed=SEED):
    return choose_findings(draw_patient_body(SEED), keys, seed, least_radius_mm=5.2)


def _sample(findings):
    return ThoraxPhantom(SEED, findings).sample(SIZE, SPACING, noise_hu=0)


def _lungs(sample):
    return (sample.anatomy >= 10) & (sample.anatomy <= 14)


@pytest.mark.parametrize("key", FINDING_PREVALENCE)
def test_every_finding_changes_the_picture(key, healthy):
    findings = _choose(key)
    assert [finding.key for finding in findings] == [key]
    changed = np.abs(_sample(findings).hu - healthy.hu) > 100
    assert changed.sum() >= 25  # 4 ml at 162 mm3 a voxel


@pytest.mark.parametrize("key", FINDING_PREVALENCE)
def test_choosing_is_a_function_of_the_seed(key):
    first, again, other = _choose(key), _choose(key), _choose(key, seed=SEED + 5)
    assert repr(first[0].to_json()) == repr(again[0].to_json())
    np.testing.assert_array_equal(_sample(first).hu, _sample(again).hu)
    assert not np.array_equal(_sample(first).hu, _sample(other).hu) or key == "medical_material"


def test_other_findings_do_not_move_a_finding():
    alone = _choose("lung_nodule")[0]
    among = next(f for f in _choose("lung_nodule", "fracture", "hiatal_hernia") if f.key == "lung_nodule")
    np.testing.assert_array_equal(alone.geometry["centres"], among.geometry["centres"])


def test_unknown_findings_are_refused():
    with pytest.raises(ValueError, match="gout"):
        _choose("gout")


@pytest.mark.parametrize("key", DRAWN_LESIONS)
def test_drawn_lesions_have_a_mask_and_only_theirs(key, healthy):
    assert not healthy.lesion_masks
    sample = _sample(_choose(key))
    assert list(sample.lesion_masks) == [key]
    mask = sample.lesion_masks[key]
    assert np.mean(np.abs(sample.hu - healthy.hu)[mask] > 40) > 0.75


def test_lesion_masks_hold_no_other_organ():
    sample = _sample(_choose(*DRAWN_LESIONS, "cardiomegaly", "hiatal_hernia", "arterial_wall_calcification"))
    assert set(sample.lesion_masks) == set(DRAWN_LESIONS)
    for key, mask in sample.lesion_masks.items():
        assert set(np.unique(sample.anatomy[mask]).tolist()) <= {0, 10, 11, 12, 13, 14}, key
    for key in ("pleural_effusion", "pericardial_effusion"):
        assert np.mean(np.abs(sample.hu[sample.lesion_masks[key]] - 12) < 60) > 0.75  # the rest are soft edges


def test_pneumonia_is_consolidation_with_a_halo():
    masks = _sample(_choose("pneumonia")).lesion_masks
    assert set(masks) == {"consolidation", "ground_glass_opacity"}
    assert not np.any(masks["consolidation"] & masks["ground_glass_opacity"])


def test_a_nodule_mask_has_the_volume_of_its_ball():
    body = draw_patient_body(SEED)
    centre = lung_points(body, np.random.default_rng(0), 5, 1, 22.0)
    geometry = {"centres": centre, "radii": np.array([15.0]), "lobes": [5]}
    finding = Finding("lung_nodule", "right", ("right_lower_lobe",), 30.0, pattern="solid", geometry=geometry)
    sample = ThoraxPhantom(SEED, [finding]).sample((80, 100, 100), (4.0, 3.6, 3.6), noise_hu=0)
    volume = sample.lesion_masks["lung_nodule"].sum() * 4.0 * 3.6 * 3.6
    assert volume == pytest.approx(4 / 3 * np.pi * 15.0**3, rel=0.06)
    assert sample.part_voxels == {("lung_nodule", 0): sample.lesion_masks["lung_nodule"].sum()}


@pytest.mark.parametrize("seed", range(6))
def test_sides_and_lobes_are_those_of_the_record(seed, healthy):
    lobe_classes = {
        "left_upper_lobe": 10,
        "left_lower_lobe": 11,
        "right_upper_lobe": 12,
        "right_middle_lobe": 13,
        "right_lower_lobe": 14,
    }
    for key in ("lung_nodule", "ground_glass_opacity", "consolidation"):
        (finding,) = _choose(key, seed=seed)
        mask = _sample([finding]).lesion_masks[key]
        touched = set(healthy.anatomy[mask & _lungs(healthy)].tolist())
        named = {lobe_classes[name] for name in finding.regions}
        assert named <= touched
        inside = np.isin(healthy.anatomy[mask & _lungs(healthy)], list(named))
        assert inside.mean() > 0.9  # a nodule may touch a fissure
        sides = {"left" if c in (10, 11) else "right" for c in named}
        assert finding.side == (sides.pop() if len(sides) == 1 else "bilateral")


def test_fluid_lies_at_the_back_and_free_air_in_front(healthy):
    middle_of_lungs = np.nonzero(_lungs(healthy))[1].mean()
    effusion = next(f for f in (_choose("pleural_effusion", seed=s)[0] for s in range(30)) if f.side == "left")
    mask = _sample([effusion]).lesion_masks["pleural_effusion"]
    assert np.nonzero(mask)[1].mean() > middle_of_lungs + 3
    assert np.nonzero(mask)[2].mean() > SIZE[2] / 2  # i grows to the left
    sample = _sample(_choose("pneumothorax"))
    free_air = _lungs(healthy) & ~_lungs(sample) & (sample.hu < -960)
    assert free_air.sum() > 100
    assert np.nonzero(free_air)[1].mean() < middle_of_lungs


def test_effusion_takes_room_from_the_lung(healthy):
    sample = _sample(_choose("pleural_effusion"))
    assert _lungs(sample).sum() < _lungs(healthy).sum()
    assert not np.any(_lungs(sample) & sample.lesion_masks["pleural_effusion"])


def test_cardiomegaly_enlarges_the_heart(healthy):
    sample = _sample(_choose("cardiomegaly"))
    assert (sample.anatomy == 51).sum() > 1.4 * (healthy.anatomy == 51).sum()


def test_pericardial_effusion_surrounds_the_heart():
    sample = _sample(_choose("pericardial_effusion"))
    mask = sample.lesion_masks["pericardial_effusion"]
    assert not np.any(mask & (sample.anatomy == 51))
    assert abs(np.median(sample.hu[mask]) - 12) < 8


def test_emphysema_darkens_and_inflates_the_lung(healthy):
    sample = _sample(_choose("emphysema"))
    assert np.mean(sample.hu[_lungs(sample)] < -940) > np.mean(healthy.hu[_lungs(healthy)] < -940) + 0.02
    assert _lungs(sample).sum() > _lungs(healthy).sum()


def test_keep_parts_tells_place_and_size_anew():
    geometry = {"centres": [[60, 0, 0], [-60, 0, 40]], "radii": [9.0, 5.0], "lobes": [1, 3]}
    both = Finding("lung_nodule", "bilateral", ("left_upper_lobe", "right_upper_lobe"), 18.0, "", "solid", geometry)
    right = keep_parts(both, [1])
    assert (right.side, right.regions, right.size_mm) == ("right", ("right_upper_lobe",), 10.0)
    assert keep_parts(both, []) is None


@pytest.mark.parametrize(
    "keys, ct_rate, vlm3d",
    [
        ((), set(), set()),
        (("mass",), set(), {"Mass"}),
        (
            ("pneumonia",),
            {"Lung opacity", "Consolidation"},
            {"Pneumonia", "Consolidation", "Ground-glass opacity"},
        ),
        (("ground_glass_opacity",), {"Lung opacity"}, {"Ground-glass opacity"}),
        (
            ("pulmonary_edema",),
            {"Lung opacity", "Interlobular septal thickening"},
            {"Pulmonary edema", "Ground-glass opacity"},
        ),
        (("coronary_artery_wall_calcification",), {"Coronary artery wall calcification"}, {"Calcification"}),
        (("pulmonary_fibrotic_sequela",), {"Pulmonary fibrotic sequela"}, {"Fibrosis"}),
    ],
)
def test_labels_follow_from_findings(keys, ct_rate, vlm3d):
    findings = [Finding(key, "", ()) for key in keys]
    labels, others = ct_rate_labels(findings), vlm3d_labels(findings)
    assert tuple(labels) == CT_RATE_18 and tuple(others) == VLM3D_18
    assert {name for name, value in labels.items() if value} == ct_rate
    assert {name for name, value in others.items() if value} == vlm3d


def test_every_label_of_both_sets_has_a_finding():
    everything = [Finding(key, "", ()) for key in FINDING_PREVALENCE]
    assert all(ct_rate_labels(everything).values()) and all(vlm3d_labels(everything).values())


def _part_sizes(mask):
    parts, count = label(mask, structure=np.ones((3, 3, 3)))
    return np.bincount(parts.ravel(), minlength=count + 1)[1:]


@pytest.mark.parametrize("key", ["pleural_effusion", "pericardial_effusion"])
def test_an_effusion_has_no_specks(key):
    """Organs painted over fluid leave specks of it, which nobody would draw and every metric of lesions would count."""
    for seed in range(8):
        body = draw_patient_body(seed)
        findings = choose_findings(body, [key, "cardiomegaly"], seed, least_radius_mm=5.2)
        sizes = _part_sizes(ThoraxPhantom(seed, findings).sample(SIZE, SPACING, noise_hu=0).lesion_masks[key])
        assert sizes.min() >= 0.03 * sizes.max(), (seed, sizes)


def test_specks_are_parts_below_three_hundredths_of_the_largest():
    mask = np.zeros((12, 14, 16), dtype=bool)
    mask[:4, :5, :5] = True  # 100
    mask[6:7, 0:3, 0:1] = True  # 3
    mask[10, 10, 10] = mask[11, 11, 11] = True  # 2, joined at a corner
    expected = mask.copy()
    expected[10:] = False
    np.testing.assert_array_equal(_without_specks(mask), expected)
    np.testing.assert_array_equal(_without_specks(expected), expected)
    mask[9, 9, 9] = True  # the corner's third voxel
    np.testing.assert_array_equal(_without_specks(mask), mask)


def test_nodules_are_no_specks_of_each_other():
    body = draw_patient_body(SEED)
    centres = lung_points(body, np.random.default_rng(0), 5, 2, 22.0)
    geometry = {"centres": centres, "radii": np.array([18.0, 4.5]), "lobes": [5, 5]}
    finding = Finding("lung_nodule", "right", ("right_lower_lobe",), 36.0, pattern="solid", geometry=geometry)
    sample = ThoraxPhantom(SEED, [finding]).sample((80, 100, 100), (4.0, 3.6, 3.6), noise_hu=0)
    sizes = _part_sizes(sample.lesion_masks["lung_nodule"])
    assert len(sizes) == 2 and 0 < sizes.min() < 0.03 * sizes.max()
