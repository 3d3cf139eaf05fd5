import numpy as np
import pytest

from vlm3d_ext.metrics.box_scores import BoxesOfScan, score_boxes
from vlm3d_ext.metrics.challenge_box_figures import challenge_box_figures

NONE = np.zeros((0, 6))


def along_x(*spans):
    return np.array([[start, 0, 0, end - start, 1, 1] for start, end in spans], dtype=float).reshape(-1, 6)


def one(predicted, probabilities, truth):
    return BoxesOfScan(along_x(*predicted), np.array(probabilities, dtype=float), along_x(*truth))


def test_pairs_that_do_not_count_displace_one_that_does():
    """The case of test_box_matching: 0.11 + 0.09 of IoU is taken before 0.19, and only 0.11 is left."""
    boxes = one([(76, 124), (0, 9)], [1, 1], [(0, 100), (110, 200)])
    assert challenge_box_figures([{"a": boxes}], ["a"]).iou["a"] == pytest.approx(14 / 124)
    assert score_boxes([boxes]).mean_iou == pytest.approx(24 / 124)


def test_means_of_diseases_and_worst_figures_for_what_is_missed():
    scans = [
        {"found": one([(0, 5)], [1], [(0, 10)]), "missed": one([(70, 80)], [1], [(0, 10)])},
        {"found": one([(20, 30)], [1], [(20, 30)]), "absent": one([(0, 1)], [1], [])},
    ]
    figures = challenge_box_figures(scans, ["found", "missed", "absent"])
    assert figures.iou == pytest.approx({"found": 0.75, "missed": 0.0, "absent": float("nan")}, nan_ok=True)
    assert figures.distance_mm == pytest.approx({"found": 1.25, "missed": 768.0, "absent": float("nan")}, nan_ok=True)
    assert figures.macro_iou == pytest.approx(0.375) and figures.macro_distance_mm == pytest.approx((1.25 + 768) / 2)


def test_each_scan_has_its_own_false_positives():
    """The first scan's boxes: false at 0.9 and 0.8, found at 0.7, false at 0.6, found at 0.5; the second's: found."""
    scans = [
        {
            "a": one([(70, 80), (0, 10), (20, 30)], [0.9, 0.7, 0.5], [(0, 10), (20, 30)]),
            "b": one([(70, 80), (80, 90)], [0.8, 0.6], [(0, 10)]),
        },
        {"a": one([(0, 10)], [0.1], [(0, 10)])},
    ]
    figures = challenge_box_figures(scans, ["a", "b"])
    assert figures.sensitivity == pytest.approx((1 / 4, 1 / 4, 1 / 4, 3 / 4))
    # A curve over thresholds has to show all of the second scan's boxes together with those of the first.
    assert score_boxes([scan["a"] for scan in scans]).sensitivity == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_a_second_box_on_a_lesion_is_a_false_positive():
    boxes = one([(0, 10), (0, 9), (20, 30)], [0.9, 0.8, 0.7], [(0, 10), (20, 30)])
    assert challenge_box_figures([{"a": boxes}], ["a"]).sensitivity == (0.5, 0.5, 1.0, 1.0)


def test_without_lesions_all_is_undefined():
    figures = challenge_box_figures([{"a": one([(0, 1)], [1], [])}], ["a"])
    assert np.isnan([figures.macro_iou, figures.macro_distance_mm, *figures.sensitivity]).all()
