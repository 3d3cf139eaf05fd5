import pytest

from benchmarks import prepared_volumes, scaling_rows
from benchmarks.growth import Growth, fitted_exponent, growth_row, quadratic_share, time_growth
from benchmarks.preparation_growth import scaling_planning, scaling_preparation
from benchmarks.row import ResultsDiffer
from benchmarks.scaling_rows import scaling_loading, scaling_slices, scaling_voxels

SIZES = (1, 2, 4, 8)
TINY = {
    "patch_size": (2, 4, 4),
    "hidden_size": 24,
    "num_layers": 1,
    "num_heads": 4,
    "num_depth_heads": 1,
    "mlp_dim": 32,
}
TINY_LOCALIZER = {
    **TINY, "denoising_layers": 1, "denoising_mlp_dim": 24, "stem_channels": 4, "base_channels": 8, "head_channels": 4,
    "level_strides": [[2, 2, 2], [2, 2, 2]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("costs", "exponent"),
    [([3.0 * n for n in SIZES], 1.0), ([0.5 * n**2 for n in SIZES], 2.0), ([7.0] * 4, 0.0)],
)
def test_exponents_of_powers(costs, exponent):
    assert fitted_exponent(SIZES, costs) == pytest.approx(exponent)


def test_a_fixed_cost_lowers_the_exponent_and_a_square_raises_it():
    """The slope of log(n + 200) is n / (n + 200), 0.24 to 0.72; that of log(n + n² / 1000) goes from 1.06 to 1.34."""
    sizes = (64, 128, 256, 512)
    assert 0.24 < fitted_exponent(sizes, [n + 200 for n in sizes]) < 0.72
    assert 1.06 < fitted_exponent(sizes, [n + n**2 / 1000 for n in sizes]) < 1.34


def test_the_share_of_the_square_by_hand():
    counts = [5 + 3 * n + 2 * n**2 for n in SIZES]
    assert quadratic_share(SIZES, counts) == pytest.approx(2 * 64 / (5 + 24 + 128))
    assert quadratic_share(SIZES, [10 * n for n in SIZES]) == 0
    assert quadratic_share(SIZES, [n**3 for n in SIZES]) is None


def test_rounds_are_compared_by_their_exponents():
    growth = Growth(SIZES, [[float(n) for n in SIZES], [n**1.5 for n in SIZES], [2.0 * n**2 for n in SIZES]], load=0.1)
    assert growth.exponent == pytest.approx(1.5)
    assert growth.spread == pytest.approx((1.75 - 1.25) / 1.5)
    assert growth.cost_by_size == {"1": "1 s", "2": "2.83 s", "4": "8 s", "8": "22.6 s"}
    assert Growth(SIZES, [[1.0, 2.0, 4.0, 8.0]]).spread is None


def test_all_sizes_are_timed_in_each_round_and_the_first_turn_is_not():
    calls = []
    growth = time_growth(lambda size, number: calls.append((size, number)), (1, 2, 8), rounds=3)
    assert calls[:2] == [(8, -1), (1, -1)]
    assert calls[2:] == [(1, 0), (2, 0), (8, 0), (8, 1), (2, 1), (1, 1), (1, 2), (2, 2), (8, 2)]
    assert len(growth.costs) == 3 and all(len(costs) == 3 for costs in growth.costs)
    with pytest.raises(ValueError, match="at least 3, got 2"):
        time_growth(print, SIZES, rounds=2)


def test_work_that_is_quadratic_is_seen():
    growth = time_growth(lambda size, _: [sum(range(size)) for _ in range(size)], (300, 600, 1200, 2400), rounds=3)
    assert growth.exponent == pytest.approx(2.0, abs=0.3)


def test_the_steepest_decides():
    linear, square = Growth(SIZES, [[float(n) for n in SIZES]], "MB"), Growth(SIZES, [[float(n * n) for n in SIZES]])
    row = growth_row("a", "what", {"bytes": linear, "time": square}, "equal")
    assert row.ratio == pytest.approx(2.0) and row.verdict == "missed"
    assert row.figures["bytes, exponent"] == pytest.approx(1.0)
    assert row.figures["bytes, cost of"]["8"] == "8 MB"
    assert growth_row("a", "what", {"bytes": linear}, "equal").verdict == "met"


def test_a_busy_machine_gets_no_exponent():
    growth = Growth(SIZES, [[float(n) for n in SIZES]] * 3, load=0.8)
    row = growth_row("a", "what", {"time": growth}, "equal")
    assert row.ratio is None and row.verdict == "refused" and "0.80 cores" in row.refused


def test_operations_over_slices():
    row = scaling_slices((8, 16, 32, 64), (16, 32), (8, 16, 32, 64), (16, 32), rounds=3, **TINY)
    # 32 tokens a slab: attention over depth is a small part, and nothing else grows faster than the slices
    assert 1.0 < row.figures["operations, exponent"] < 1.1
    assert "polynomial of degree two" in row.equality and row.target == 1.1


def test_operations_over_voxels():
    planes = ((16, 32), (32, 32), (32, 64), (64, 64))
    row = scaling_voxels(planes, 8, planes, 8, rounds=3, **TINY_LOCALIZER)
    assert 1.0 < row.figures["operations, exponent"] < 1.5
    assert list(row.figures["operations, cost of"]) == ["512", "1024", "2048", "4096"]


def test_operations_that_are_no_polynomial_are_told(monkeypatch):
    monkeypatch.setattr(scaling_rows, "quadratic_share", lambda sizes, counts: None)
    with pytest.raises(ResultsDiffer, match="no polynomial of degree two in the slices"):
        scaling_slices((8, 16, 32, 64), (16, 32), (8, 16, 32, 64), (16, 32), rounds=3, **TINY)


def test_loading_over_files():
    row = scaling_loading((2, 4, 8, 16), (4, 16, 16), rounds=3)
    assert {"npz, exponent", "blosc2, exponent"} <= row.figures.keys()
    assert row.equality == "the 2 volumes are the same among 16, and in all forms"


def test_volumes_that_differ_are_told(monkeypatch):
    """The second form gets other volumes than the first."""
    draw, seeds = prepared_volumes.smooth_volume, iter(range(1000))
    monkeypatch.setattr(prepared_volumes, "smooth_volume", lambda size, _, noise: draw(size, next(seeds), noise))
    with pytest.raises(ResultsDiffer, match="or on the form"):
        scaling_loading((1, 2, 4, 8), (4, 16, 16), rounds=3)


def test_random_volumes_use_all_grey_levels_and_regions():
    imgs, gts = prepared_volumes.smooth_volume((16, 32, 48), seed=1)
    assert imgs.shape == gts.shape == (16, 32, 48)
    assert imgs.min() == 0 and imgs.max() == 255 and 0 < (imgs == 0).mean() < 0.6
    assert gts.min() == 0 and 5 < gts.max() <= 20
    assert (imgs != prepared_volumes.smooth_volume((16, 32, 48), seed=2)[0]).mean() > 0.5


def test_preparation_over_scans_and_slices():
    row = scaling_preparation((1, 2, 4, 8), (16, 32, 64, 128), (12, 24, 24), (24, 24), (8, 16, 16), rounds=3)
    assert {"scans, exponent", "slices, exponent"} <= row.figures.keys()
    assert "the 1 scans are prepared to the same bytes among 8" in row.equality


def test_planning_over_files():
    row = scaling_planning((20, 40, 80, 160), rounds=3)
    assert {"tables and files, exponent", "plan, exponent", "manifest, exponent"} <= row.figures.keys()
    assert row.equality == "the 20 cases are the same among 160"
