import numpy as np
import pytest

from tests.metrics.random_masks import balls, blank, box_mask
from vlm3d_ext.metrics.lesion_components import label_lesions
from vlm3d_ext.metrics.lesion_detection import match_lesions, pool_lesion_matches

ROW = (3, 4), (3, 4)  # one voxel in k and j; lesions below are runs along i
SHAPE = (9, 11, 40)


def run(*spans):
    return box_mask(*((*ROW, span) for span in spans), shape=SHAPE)


@pytest.mark.parametrize(
    ("shift", "found"),
    [(0, True), (5, True), (8, True), (9, False), (10, False)],  # IoU of runs of 10: 1, 1/3, 2/18, 1/19, 0
)
def test_one_prediction_on_one_lesion_is_plain_iou(shift, found):
    matches = match_lesions(run((5 + shift, 15 + shift)), run((5, 15)))
    assert matches.found == matches.true_prediction == (found,)
    assert matches.lesion_voxels == matches.prediction_voxels == (10,)
    assert matches.contacts == (((0, 0),) if shift < 10 else ())


def test_the_limit_itself_counts():
    assert match_lesions(run((0, 4)), run((0, 8)), min_iou=0.5).found == (True,)
    assert match_lesions(run((0, 4)), run((0, 8)), min_iou=0.51).found == (False,)


def test_one_blob_over_two_lesions_finds_both():
    matches = match_lesions(run((2, 30)), run((3, 14), (16, 29)))
    assert matches.found == (True, True) and matches.true_prediction == (True,)
    assert matches.contacts == ((0, 0), (0, 1))


def test_two_pieces_of_one_lesion_are_both_true():
    matches = match_lesions(run((3, 5), (16, 29)), run((2, 30)))
    assert matches.found == (True,) and matches.true_prediction == (True, True)
    assert matches.num_false_positives == 0


def test_a_blob_over_everything_finds_nothing():
    prediction = np.ones(SHAPE, dtype=bool)
    matches = match_lesions(prediction, run((3, 14), (16, 29)))
    assert matches.found == (False, False) and matches.true_prediction == (False,)
    assert matches.precision == matches.sensitivity == 0.0


def test_a_large_lesion_lends_nothing_to_a_small_one_that_is_grazed():
    truth = run((0, 20), (22, 34))
    matches = match_lesions(run((0, 23)), truth)  # the second is covered by 1 of 12 voxels
    assert matches.found == (True, False) and matches.true_prediction == (True,)


def test_a_prediction_elsewhere_is_a_false_positive_and_changes_nothing_else():
    matches = match_lesions(run((0, 10), (30, 33)), run((0, 10), (20, 25)))
    assert matches.found == (True, False) and matches.true_prediction == (True, False)
    assert matches.sensitivity == matches.precision == 0.5 and matches.num_false_positives == 1


@pytest.mark.parametrize("seed", range(12))
def test_symmetry_and_both_sides_of_a_cluster(seed):
    shape = (9, 22, 31)
    prediction, truth = balls(shape, 9, seed, (1, 5)), balls(shape, 9, seed + 30, (1, 5))
    matches = match_lesions(prediction, truth, 0.25)
    swapped = match_lesions(truth, prediction, 0.25)
    assert matches.found == swapped.true_prediction and matches.true_prediction == swapped.found
    assert matches.lesion_voxels == swapped.prediction_voxels
    assert set(matches.contacts) == {(p, t) for t, p in swapped.contacts}
    labels, count = label_lesions(truth)
    assert matches.lesion_voxels == tuple(int((labels == label).sum()) for label in range(1, count + 1))
    assert any(matches.found) == any(matches.true_prediction)
    # A found lesion has a predicted component over it, and the other way round.
    assert all(any(t == lesion for _, t in matches.contacts) for lesion in np.flatnonzero(matches.found))
    # Flips and a margin are no reason for another number.
    flipped = match_lesions(np.pad(prediction[:, ::-1], 3), np.pad(truth[:, ::-1], 3), 0.25)
    assert sorted(zip(flipped.lesion_voxels, flipped.found, strict=True)) == sorted(
        zip(matches.lesion_voxels, matches.found, strict=True)
    )


def test_by_size():
    truth = box_mask(((0, 1), (0, 3), (0, 3)), ((4, 9), (0, 2), (0, 5)), ((4, 9), (4, 11), (0, 30)), shape=SHAPE)
    prediction = truth.copy()
    prediction[4:9, 0:2] = False
    prediction[0, 9, 39] = True
    matches = match_lesions(prediction, truth)
    assert matches.lesion_voxels == (9, 50, 1050) and matches.prediction_voxels == (9, 1, 1050)
    assert matches.sensitivity_by_size() == {"small": 1.0, "medium": 0.0, "large": 1.0}
    assert matches.precision_by_size() == pytest.approx(
        {"small": 0.5, "medium": float("nan"), "large": 1.0}, nan_ok=True
    )


def test_nothing_is_undefined_not_zero():
    nothing = match_lesions(blank(), blank())
    assert nothing.found == nothing.true_prediction == nothing.contacts == ()
    assert np.isnan([nothing.sensitivity, nothing.precision, *nothing.sensitivity_by_size().values()]).all()
    assert match_lesions(blank(), box_mask(((1, 2), (1, 2), (1, 2)))).sensitivity == 0.0
    assert match_lesions(box_mask(((1, 2), (1, 2), (1, 2))), blank()).precision == 0.0


def test_pooling_counts_lesions_not_scans():
    one = match_lesions(run((0, 10)), run((0, 10)))
    two = match_lesions(run((0, 10)), run((0, 10), (20, 23), (30, 33)))
    pooled = pool_lesion_matches([two, match_lesions(blank(), blank()), one])
    assert pooled.found == (True, False, False, True) and pooled.sensitivity == 0.5
    assert pooled.lesion_voxels == (10, 3, 3, 10) and pooled.contacts == ((0, 0), (1, 3))
    assert pool_lesion_matches([]).found == ()


@pytest.mark.parametrize("min_iou", [0.0, 1.5, float("nan")])
def test_bad_min_iou(min_iou):
    with pytest.raises(ValueError, match="min_iou must be above 0 and at most 1"):
        match_lesions(blank(), blank(), min_iou)
