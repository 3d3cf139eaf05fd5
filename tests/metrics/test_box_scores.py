import numpy as np
import pytest

from vlm3d_ext.metrics.box_scores import BoxesOfScan, score_boxes

NONE = np.zeros((0, 6))


def along_x(*spans):
    return np.array([[start, 0, 0, end - start, 1, 1] for start, end in spans], dtype=float).reshape(-1, 6)


def test_hand_computed_figures_over_three_scans():
    scans = [
        # One pair of IoU 1/2 and distance 2.5, one box too many.
        BoxesOfScan(along_x((0, 5), (90, 95)), np.array([0.9, 0.3]), along_x((0, 10))),
        # One pair of IoU 1, one lesion missed.
        BoxesOfScan(along_x((20, 30)), np.array([0.2]), along_x((20, 30), (50, 60))),
        # Without lesions, one false positive.
        BoxesOfScan(along_x((0, 3)), np.array([0.5]), NONE),
    ]
    scores = score_boxes(scans)
    assert (scores.num_scans, scores.num_lesions, scores.num_boxes, scores.num_matched) == (3, 3, 4, 2)
    assert scores.mean_iou == pytest.approx(0.75) and scores.centroid_distance_mm == pytest.approx(1.25)
    # 0.9 finds one; 0.5 and 0.3 are false: 1/3 and 2/3 a scan; 0.2 finds another.
    assert scores.sensitivity == pytest.approx((1 / 3, 2 / 3, 2 / 3, 2 / 3))


def test_nothing_to_find_and_nothing_predicted():
    empty = BoxesOfScan(NONE, np.zeros(0), NONE)
    for scans in ([], [empty, empty]):
        scores = score_boxes(scans)
        assert scores.num_scans == len(scans) and scores.num_lesions == scores.num_boxes == 0
        assert np.isnan([scores.mean_iou, scores.centroid_distance_mm, *scores.sensitivity]).all()
    missed = score_boxes([BoxesOfScan(NONE, np.zeros(0), along_x((0, 1)))])
    assert missed.sensitivity == (0.0,) * 4 and np.isnan(missed.mean_iou)
