from itertools import permutations

import numpy as np
import pytest

from vlm3d_ext.metrics.box_matching import box_candidates, box_iou, centroid_distances_mm, match_boxes
from vlm3d_ext.metrics.froc import froc

NAN = float("nan")


def random_boxes(num, seed):
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.uniform(-30, 10, (num, 3)), generator.uniform(5, 40, (num, 3))], axis=1)


def along_x(*spans):
    return np.array([[start, 0, 0, end - start, 1, 1] for start, end in spans], dtype=float)


def test_hand_computed_iou_and_distance():
    a = [[0, 0, 0, 2, 2, 2], [-5, -5, -5, 1, 1, 1]]
    b = [[1, 1, 0, 2, 2, 2], [0, 0, 0, 2, 2, 2], [2, 0, 0, 3, 3, 3]]
    np.testing.assert_allclose(box_iou(a, b), [[2 / 14, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(centroid_distances_mm(a, b)[0], [np.sqrt(2), 0, np.linalg.norm([2.5, 0.5, 0.5])])


def test_iou_is_the_share_of_voxels():
    """Boxes with whole corners, drawn on a grid of 1 mm."""
    a, b = np.round(random_boxes(6, 0) / 4), np.round(random_boxes(5, 1) / 4)

    def drawn(box):
        mask = np.zeros((40, 40, 40), dtype=bool)
        low = (box[:3] + 15).astype(int)
        high = low + box[3:].astype(int)
        mask[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = True
        return mask

    expected = [[(drawn(p) & drawn(t)).sum() / (drawn(p) | drawn(t)).sum() for t in b] for p in a]
    np.testing.assert_allclose(box_iou(a, b), expected)
    np.testing.assert_allclose(box_iou(a, b), box_iou(b, a).T)


@pytest.mark.parametrize("seed", range(8))
def test_the_sum_of_allowed_iou_is_the_largest_of_all_assignments(seed):
    predicted, truth = random_boxes(5, seed), random_boxes(4, seed + 20)
    iou = box_iou(predicted, truth)
    allowed = np.where(iou >= 0.1, iou, 0)
    best = max(sum(allowed[p, t] for t, p in enumerate(chosen)) for chosen in permutations(range(5), 4))
    matches = match_boxes(predicted, truth, 0.1)
    assert matches.iou.sum() == pytest.approx(best) and (matches.iou >= 0.1).all()
    assert len(set(matches.predicted)) == len(set(matches.truth)) == len(matches.iou)
    np.testing.assert_allclose(iou[matches.predicted, matches.truth], matches.iou)
    distances = centroid_distances_mm(predicted, truth)
    np.testing.assert_allclose(distances[matches.predicted, matches.truth], matches.centroid_distance_mm)


def test_pairs_below_the_limit_never_displace_an_allowed_one():
    """An assignment by 1 - IoU alone takes pairs (0, 1) and (1, 0), 0.11 + 0.09 of IoU, and is left with 0.11; pair
    (0, 0) has 0.19."""
    truth = along_x((0, 100), (110, 200))
    predicted = along_x((76, 124), (0, 9))
    iou = box_iou(predicted, truth)
    assert iou[1, 0] < 0.1 < iou[0, 1] < iou[0, 0] < iou[0, 1] + iou[1, 0]
    matches = match_boxes(predicted, truth, 0.1)
    assert (matches.predicted.tolist(), matches.truth.tolist()) == ([0], [0])
    assert matches.iou.tolist() == [iou[0, 0]]


def test_means_and_counts():
    matches = match_boxes(along_x((0, 10), (50, 60), (90, 95)), along_x((0, 5), (52, 62)))
    assert (matches.num_predicted, matches.num_truth) == (3, 2)
    assert matches.mean_iou == pytest.approx((0.5 + 8 / 12) / 2)
    assert matches.mean_centroid_distance_mm == pytest.approx((2.5 + 2) / 2)
    for predicted, truth in (((), ()), (along_x((0, 1)), ()), ((), along_x((0, 1)))):
        nothing = match_boxes(np.array(predicted), np.array(truth))
        assert np.isnan(nothing.mean_iou) and np.isnan(nothing.mean_centroid_distance_mm)
        assert (nothing.num_predicted, nothing.num_truth) == (len(predicted), len(truth))


def test_candidates_take_the_surest_box_first_and_count_doubles():
    truth = along_x((0, 10), (20, 30), (40, 50))
    predicted = along_x((0, 10), (1, 10), (21, 30), (70, 80))
    candidates = box_candidates(predicted, [0.5, 0.9, 0.4, 0.6], truth)
    assert candidates.is_true.tolist() == [False, True, True, False]  # the exact box came second
    assert candidates.lesion_best_score.tolist() == pytest.approx([0.9, 0.4, NAN], nan_ok=True)
    curve = froc(candidates.scores, candidates.is_true, candidates.lesion_best_score, num_scans=1)
    assert curve.sensitivity_at((0, 1, 2)) == pytest.approx((1 / 3, 1 / 3, 2 / 3))


def test_of_equally_sure_boxes_the_better_one_counts():
    candidates = box_candidates(along_x((0, 5), (0, 10)), [0.7, 0.7], along_x((0, 10)))
    assert candidates.is_true.tolist() == [False, True] and candidates.lesion_best_score.tolist() == [0.7]


def test_no_boxes_on_either_side():
    lonely = box_candidates(along_x((0, 5)), [0.7], np.zeros((0, 6)))
    assert lonely.is_true.tolist() == [False] and lonely.lesion_best_score.shape == (0,)
    missed = box_candidates([], [], along_x((0, 5)))
    assert missed.scores.shape == (0,) and np.isnan(missed.lesion_best_score).tolist() == [True]


def test_bad_boxes_are_refused():
    with pytest.raises(ValueError, match=r"boxes a must be \(N, 6\)"):
        box_iou([[0, 0, 0, 1, 1]], [])
    with pytest.raises(ValueError, match=r"box 1 of b must be finite with positive sizes dx, dy, dz, got \[0.0, 0.0"):
        match_boxes([], [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1]])
    with pytest.raises(ValueError, match="min_iou must be above 0"):
        match_boxes([], [], 0)
    with pytest.raises(ValueError, match=r"probabilities must be \(1,\)"):
        box_candidates([[0, 0, 0, 1, 1, 1]], [], [])
