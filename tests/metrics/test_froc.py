import numpy as np
import pytest

from tests.metrics.random_masks import balls, blank, box_mask
from vlm3d_ext.metrics.froc import candidates_of, froc, pool_candidates
from vlm3d_ext.metrics.lesion_detection import match_lesions

NAN = float("nan")

# Two scans, four lesions (the last is never found). By hand, from the top:
#   0.9  finds lesion 0                                       0 FP   1/4
#   0.8  false positive and, at the same score, finds lesion 1  1 FP   2/4
#   0.6  two false positives, one more candidate on lesion 0  3 FP   2/4
#   0.5  finds lesion 2                                       3 FP   3/4
#   0.2  false positive                                       4 FP   3/4
SCORES = [0.8, 0.6, 0.9, 0.6, 0.8, 0.2, 0.6, 0.5]
IS_TRUE = [False, False, True, False, True, False, True, True]
BEST = [0.9, 0.8, 0.5, NAN]


def test_a_hand_made_curve_with_ties():
    curve = froc(SCORES, IS_TRUE, BEST, num_scans=2)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.6, 0.5, 0.2]
    assert curve.false_positives_per_scan.tolist() == [0, 0.5, 1.5, 1.5, 2]
    assert curve.sensitivity.tolist() == [0.25, 0.5, 0.5, 0.75, 0.75]
    assert curve.sensitivity_at() == (0.5, 0.5, 0.75, 0.75)
    assert curve.sensitivity_at((0, 0.49, 1.49, 1.5)) == (0.25, 0.25, 0.5, 0.75)  # nothing between is made up


def test_order_does_not_matter_and_scans_without_anything_count():
    order = np.random.default_rng(0).permutation(len(SCORES))
    curve = froc(np.array(SCORES)[order], np.array(IS_TRUE)[order], BEST[::-1], num_scans=4)
    assert curve.false_positives_per_scan.tolist() == [0, 0.25, 0.75, 0.75, 1]
    assert curve.sensitivity_at((0.5, 1)) == (0.5, 0.75)


def test_where_the_surest_candidates_bring_too_many_false_positives():
    curve = froc([0.9, 0.9, 0.9], [True, False, False], [0.9], num_scans=1)
    assert curve.sensitivity_at((0.5, 1, 2)) == (0.0, 0.0, 1.0)


def test_limits():
    no_lesion = froc([0.4], [False], [], num_scans=3)
    assert np.isnan(no_lesion.sensitivity_at()).all() and np.isnan(no_lesion.sensitivity).all()
    assert no_lesion.false_positives_per_scan.tolist() == [1 / 3]
    silent = froc([], [], [NAN, NAN], num_scans=3)
    assert silent.sensitivity_at() == (0.0, 0.0, 0.0, 0.0) and silent.thresholds.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], [True, False], [0.5], 1), r"got \(1,\), \(2,\)"),
        (([NAN], [True], [0.5], 1), "1 of 1 are NaN"),
        (([0.5], [True], [0.5], 0), "num_scans must be at least 1, got 0"),
        (([0.5], [True], [0.7], 1), "found at the score 0.7, but no candidate has it"),
    ],
)
def test_what_makes_no_curve_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        froc(*arguments)


def test_candidates_of_a_scan():
    shape = (9, 11, 40)
    truth = box_mask(((3, 4), (3, 4), (0, 10)), ((3, 4), (3, 4), (20, 30)), shape=shape)
    probabilities = np.zeros(shape, dtype=np.float32)
    probabilities[3, 3, 0:4], probabilities[3, 3, 5:9] = 0.5, 0.75  # two pieces of the first lesion
    probabilities[7, 7, 7] = 0.875  # nowhere
    probabilities[3, 3, 20:30] = 0.125  # the second, below the threshold
    found = candidates_of(probabilities, truth, threshold=0.25)
    assert found.scores.tolist() == [0.5, 0.75, 0.875] and found.is_true.tolist() == [True, True, False]
    assert found.lesion_best_score.tolist() == pytest.approx([0.75, NAN], nan_ok=True)
    lower = candidates_of(probabilities, truth, threshold=0.125)
    assert lower.lesion_best_score.tolist() == [0.75, 0.125]


@pytest.mark.parametrize("seed", range(5))
def test_at_its_own_threshold_the_curve_is_what_the_mask_scores(seed):
    shape, generator = (9, 22, 31), np.random.default_rng(seed)
    scans, matches = [], []
    for scan in range(3):
        truth = balls(shape, 5, 100 * seed + scan, (1, 4))
        smooth = balls(shape, 7, 100 * seed + scan + 50, (1, 4)) | (truth & (generator.random(shape) < 0.8))
        probabilities = np.where(smooth, generator.uniform(0.3, 1, shape), generator.uniform(0, 0.29, shape))
        scans.append(candidates_of(probabilities, truth, 0.3))
        matches.append(match_lesions(probabilities >= 0.3, truth))
    pooled = pool_candidates(scans)
    curve = froc(pooled.scores, pooled.is_true, pooled.lesion_best_score, num_scans=3)
    found = [flag for scan in matches for flag in scan.found]
    assert curve.sensitivity[-1] == pytest.approx(np.mean(found))
    assert curve.false_positives_per_scan[-1] == pytest.approx(sum(m.num_false_positives for m in matches) / 3)
    assert (np.diff(curve.sensitivity) >= 0).all() and (np.diff(curve.false_positives_per_scan) >= 0).all()


def test_a_scan_without_lesions_or_without_candidates():
    empty = candidates_of(np.zeros((9, 11, 13)), blank(), 0.5)
    assert empty.scores.shape == empty.is_true.shape == empty.lesion_best_score.shape == (0,)
    with pytest.raises(ValueError, match="threshold must be above 0 and at most 1, got 0"):
        candidates_of(np.zeros((9, 11, 13)), blank(), 0)
