"""The drawing surface: distances, boxes and coverage against hand-computed numbers."""

import numpy as np
import pytest

from data_prep.phantom_shapes import Canvas, cells, ellipsoid_distance, ramp, wobble


def _canvas(size=(21, 23, 25), spacing=(2.0, 1.5, 1.0), edge_mm=1.0):
    d, h, w = size
    z, y, x = np.meshgrid(
        *[np.arange(n, dtype=np.float32) * s for n, s in zip(size, spacing, strict=True)], indexing="ij"
    )
    index_from_body = np.diag([1 / spacing[2], 1 / spacing[1], 1 / spacing[0], 1.0])
    assert x.shape == (d, h, w)
    return Canvas(x, y, z, index_from_body, edge_mm)


def test_distance_to_a_sphere_is_exact():
    x = np.array([3.0, 10.0, 0.0])
    distance = ellipsoid_distance(x, np.zeros(3), np.zeros(3), (0, 0, 0), (5, 5, 5))
    np.testing.assert_allclose(distance, [-2.0, 5.0, -5.0], atol=1e-5)


def test_distance_to_an_ellipsoid_is_zero_on_it_and_true_on_its_axes():
    on_axes = ellipsoid_distance(np.array([4.0, 6.0]), np.zeros(2), np.zeros(2), (0, 0, 0), (4, 2, 8))
    np.testing.assert_allclose(on_axes, [0.0, 2.0], atol=1e-5)


def test_box_holds_exactly_the_voxels_in_reach():
    canvas = _canvas()
    k, j, i = canvas.box((10.0, 15.0, 20.0), 3.0)  # 3 mm and an edge of 1 mm
    assert (i.start, i.stop) == (6, 15)  # 6 to 14 mm in steps of 1
    assert (j.start, j.stop) == (8, 13)  # 11 to 19 mm in steps of 1.5: voxels 8 to 12
    assert (k.start, k.stop) == (8, 13)  # 16 to 24 mm in steps of 2
    assert canvas.box((-100.0, 15.0, 20.0), 3.0) is None


def test_an_ellipsoid_has_its_volume():
    canvas = _canvas((41, 51, 61), (1.0, 1.0, 1.0))
    canvas.add_ellipsoid((30, 25, 20), (12, 10, 8), hu=40.0, label=7)
    expected = 4 / 3 * np.pi * 12 * 10 * 8
    assert (canvas.anatomy == 7).sum() == pytest.approx(expected, rel=0.02)
    covered = (canvas.hu + 1000.0).sum() / 1040.0
    assert covered == pytest.approx(expected, rel=0.02)


def test_a_tube_has_its_cross_section():
    canvas = _canvas((41, 41, 41), (1.0, 1.0, 1.0))
    canvas.add_tube(np.array([[20, 20, -50], [20, 20, 90]]), 6.0, hu=0.0, label=3)
    assert (canvas.anatomy[20] == 3).sum() == pytest.approx(np.pi * 36, rel=0.05)


def test_a_thin_tube_covers_part_of_a_voxel():
    canvas = _canvas((11, 11, 11), (3.0, 3.0, 3.0), edge_mm=3.0)
    canvas.add_tube(np.array([[15, 15, -50], [15, 15, 90]]), 0.5, hu=0.0)
    assert -1000 < canvas.hu[5, 5, 5] < -600


def test_ramp_runs_both_ways():
    np.testing.assert_allclose(ramp(np.array([0.0, 1.0, 1.5, 2.0, 9.0]), 1.0, 2.0), [0, 0, 0.5, 1, 1])
    np.testing.assert_allclose(ramp(np.array([0.0, 1.25, 3.0]), 2.0, 1.0), [1, 0.84375, 0])


def test_cells_are_divided_by_the_bisecting_planes():
    rng = np.random.default_rng(0)
    points = rng.uniform(-80, 80, (3, 4000))
    to_wall, index = cells(*points, seed=4, cell_mm=20.0)
    assert to_wall.min() >= 0
    # A step shorter than the distance to the wall never leaves the cell.
    step = rng.normal(size=(3, 4000))
    step *= 0.98 * to_wall / np.linalg.norm(step, axis=0)
    _, after = cells(*(points + step), seed=4, cell_mm=20.0)
    np.testing.assert_array_equal(after, index)
    assert len(np.unique(index)) > 200


def test_wobble_depends_on_the_place_only():
    x = np.linspace(-50, 50, 7)
    np.testing.assert_allclose(wobble(x, x, x, 3, 20.0)[2:4], wobble(x[2:4], x[2:4], x[2:4], 3, 20.0))
    assert not np.allclose(wobble(x, x, x, 3, 20.0), wobble(x, x, x, 4, 20.0))
