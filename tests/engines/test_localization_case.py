import math

import numpy as np
import pytest

from tests.engines.drawn_cases import SOURCE, ball, make_case
from vlm3d_ext.data.prepared_case import PreparedCaseError
from vlm3d_ext.data.scan_reader import UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_binary_mask, restore_mask, target_geometry, write_mask_nifti
from vlm3d_ext.engines.localization_case import DiseaseTruth, ScanGrids, evaluate_case, read_grids, read_truth
from vlm3d_ext.metrics.lesion_components import lesions_of, size_bin
from vlm3d_ext.metrics.lesion_dice import dice_by_lesion
from vlm3d_ext.metrics.mask_overlap import dice_score

BIG, SMALL = ball((10, 12, 12), 9.0), ball((6, 27, 30), 5.0)
NOWHERE = np.zeros(SOURCE.shape, dtype=bool)


@pytest.fixture
def grids(tmp_path):
    return read_grids(make_case(tmp_path / "grids", "train_1_a_1", {})["geometry"])


def evaluate(grids, truth, probabilities, threshold=0.5, **options):
    return evaluate_case(
        "train_1_a_1", "train_1", "lung_nodule", truth, probabilities.astype(np.float32), threshold, grids, **options
    )


@pytest.mark.parametrize(
    ("masks", "label", "partial", "status"),
    [
        ({}, 0.0, (), "negative"),
        ({}, 1.0, (), "unknown"),
        ({}, math.nan, (), "unknown"),
        ({"lung_nodule": BIG}, 1.0, (), "positive"),
        ({"lung_nodule": BIG}, 0.0, (), "positive"),
        ({"lung_nodule": BIG}, 1.0, ("lung_nodule",), "partial"),
        ({"lung_nodule": NOWHERE}, math.nan, (), "negative"),
        ({"lung_nodule": NOWHERE}, 1.0, (), "unknown"),
        ({"lung_nodule": NOWHERE}, math.nan, ("lung_nodule",), "unknown"),
    ],
)
def test_what_mask_and_label_say(tmp_path, masks, label, partial, status):
    case = make_case(tmp_path, "train_1_a_1", masks, partial=partial)
    truth = read_truth(case, "lung_nodule", label, read_grids(case["geometry"]))
    assert truth.status == status
    if status in ("positive", "partial"):
        np.testing.assert_array_equal(truth.mask, BIG)  # in the file's own axis order
    else:
        assert truth.mask is None and truth.prepared_mask is None


def test_a_perfect_prediction_and_the_ceiling(tmp_path):
    case = make_case(tmp_path, "train_1_a_1", {"lung_nodule": BIG | SMALL})
    grids = read_grids(case["geometry"])
    truth = read_truth(case, "lung_nodule", 1.0, grids)
    perfect = evaluate(grids, truth, truth.mask, baseline=BIG)
    assert perfect.dice == perfect.surface_dice == 1.0 and perfect.hausdorff_95_mm == 0.0
    assert perfect.lesion_dice == (1.0, 1.0) and perfect.matches.found == (True, True)
    assert perfect.baseline_dice == pytest.approx(2 * BIG.sum() / (2 * BIG.sum() + SMALL.sum()))
    ceiling = restore_mask(truth.prepared_mask, grids.prepared, grids.source).astype(bool)
    assert 0.7 < perfect.ceiling_dice < 1 and perfect.ceiling_dice == dice_score(ceiling, truth.mask)
    # Drawing exactly the prepared mask reaches the ceiling, whole and lesion by lesion.
    drawn = evaluate(grids, truth, ceiling)
    assert drawn.dice == drawn.ceiling_dice and drawn.lesion_dice == drawn.ceiling_lesion_dice


def test_distances_are_in_mm_of_the_scans_own_grid(grids):
    shifted = np.roll(BIG, 1, axis=0)
    spacing_k = grids.source.spacing_mm[0]
    assert evaluate(grids, DiseaseTruth("positive", BIG), shifted).hausdorff_95_mm == pytest.approx(spacing_k)
    with_margin = evaluate(grids, DiseaseTruth("positive", BIG), np.roll(BIG, 1, axis=2))
    assert with_margin.surface_dice == 1.0 and with_margin.dice < 1  # 1.5 mm is within 2 mm


def test_nothing_predicted(grids):
    missed = evaluate(grids, DiseaseTruth("positive", BIG), NOWHERE)
    assert missed.dice == missed.surface_dice == 0.0 and math.isnan(missed.hausdorff_95_mm)
    assert missed.lesion_dice == (0.0,) and missed.matches.found == (False,)
    assert math.isnan(missed.ceiling_dice) and math.isnan(missed.baseline_dice)


def test_a_negative_scan_has_false_positives_only(grids):
    evaluated = evaluate(grids, DiseaseTruth("negative"), BIG | SMALL)
    assert evaluated.matches.num_false_positives == 2 and evaluated.matches.found == ()
    assert math.isnan(evaluated.dice) and evaluated.num_predicted_voxels == BIG.sum() + SMALL.sum()
    assert evaluate(grids, DiseaseTruth("negative"), NOWHERE).matches.num_false_positives == 0


def test_beside_a_partial_annotation_only_found_lesions_count(grids):
    evaluated = evaluate(grids, DiseaseTruth("partial", BIG), BIG | SMALL)
    assert evaluated.matches.found == (True,) and evaluated.matches.true_prediction == ()
    assert math.isnan(evaluated.dice) and evaluated.candidates is None and evaluated.lesion_dice == ()
    assert evaluated.matches.num_false_positives == 0


def test_of_an_unknown_scan_nothing_counts(grids):
    evaluated = evaluate(grids, DiseaseTruth("unknown"), BIG)
    assert math.isnan(evaluated.dice) and evaluated.candidates is None
    assert evaluated.matches.found == () == evaluated.matches.true_prediction


def test_faint_lesions_are_candidates_of_their_own(grids):
    bridge = np.zeros_like(BIG)
    bridge[10, 12, 12:34] = True
    probabilities = np.maximum(0.8 * BIG, 0.3 * SMALL)
    probabilities = np.maximum(probabilities, 0.2 * bridge)
    evaluated = evaluate(grids, DiseaseTruth("positive", BIG | SMALL), probabilities)
    # The faint lesion is found by a candidate below the threshold; the faint bridge stays out of the strong one.
    assert evaluated.matches.found == (False, True) or evaluated.matches.found == (True, False)
    np.testing.assert_allclose(sorted(evaluated.candidates.scores), [0.3, 0.8], rtol=1e-6)
    np.testing.assert_allclose(sorted(evaluated.candidates.lesion_best_score), [0.3, 0.8], rtol=1e-6)


def test_windows_of_a_scan_are_refused(tmp_path):
    case = make_case(tmp_path, "train_1_a_1", {}, num_windows=3)
    with pytest.raises(PreparedCaseError, match=r'train_1_a_1\.json: is one of 3 windows .* depth policy "resample"'):
        read_grids(case["geometry"])


def test_masks_on_other_grids_are_refused(tmp_path):
    case = make_case(tmp_path, "train_1_a_1", {"lung_nodule": BIG})
    grids = read_grids(case["geometry"])
    write_mask_nifti(
        case["lesion_masks_original_grid"]["lung_nodule"],
        NOWHERE[:-1].copy(),
        type(SOURCE)((SOURCE.shape[0] - 1, *SOURCE.shape[1:]), SOURCE.affine_lps),
    )
    with pytest.raises(UnusableScanError, match=r"lung_nodule/train_1_a_1\.nii\.gz: lies on a grid of \(19, 36, 40\)"):
        read_truth(case, "lung_nodule", 1.0, grids)
    del case["lesion_masks_original_grid"]
    with pytest.raises(UnusableScanError, match="prepared grid only"):
        read_truth(case, "lung_nodule", 1.0, grids)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_a_sure_mask_comes_back_alike_whatever_the_threshold(threshold):
    """Probabilities of 1 and 0 on slices twice as thick: the surface lies half way between voxels, not at the "
    "threshold."""
    prepared = VolumeGeometry.from_spacing((5, 9, 11), (10.0, 4.0, 4.0))
    source = VolumeGeometry.from_spacing((10, 17, 21), (5.0, 2.0, 2.0))
    mask = np.zeros(prepared.shape, dtype=np.float32)
    mask[1:4, 3:6, 4:8] = 1
    grids = ScanGrids(prepared, source)
    restored = grids.restore(mask, threshold)
    np.testing.assert_array_equal(restored >= threshold, grids.restore(mask, 0.5) >= 0.5)
    faint = np.where(mask > 0, np.float32(0.95), 0)
    assert (grids.restore(faint, threshold, presence_threshold=0.95) >= threshold).any()
    assert not (grids.restore(faint, threshold, presence_threshold=0.96) >= threshold).any()


@pytest.mark.parametrize("prepared_size", [(20, 36, 40), (40, 72, 80), (30, 54, 60)])
def test_where_the_prepared_grid_is_as_fine_as_the_scan_the_ceiling_is_high_for_every_size(prepared_size):
    """8, 109 and more than 1000 voxels, there and back: the inverse loses little of any lesion's Dice."""
    small = np.zeros(SOURCE.shape, dtype=bool)
    small[2:4, 4:6, 30:32] = True
    mask = small | ball((14, 8, 8), 5.5) | ball((9, 22, 22), 16.0)
    (prepared,) = target_geometry(SOURCE.canonical(), prepared_size)
    there = resample_binary_mask(np.ascontiguousarray(SOURCE.to_canonical(mask)), SOURCE.canonical(), prepared)
    back = restore_mask(there, prepared, SOURCE) > 0
    by_size = dict(
        zip((size_bin(lesion.num_voxels) for lesion in lesions_of(mask)), dice_by_lesion(back, mask), strict=True)
    )
    assert by_size.keys() == {"small", "medium", "large"}
    assert min(by_size.values()) >= 0.95
