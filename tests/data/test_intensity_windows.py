"""Windows: limits, rounding, and one result for every input type."""

import numpy as np
import pytest

from vlm3d_ext.data.intensity_windows import INTENSITY_WINDOWS, apply_window, window_centre_width


def test_soft_tissue_is_the_default_and_exact_at_its_limits():
    hu = np.array([-32768, -161, -160, 40, 240, 241, 32767], dtype=np.int16)
    # 40 HU is the centre: 127.5, rounded half to even.
    assert apply_window(hu).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_values_between_the_limits_are_linear():
    # width 510: two HU are one grey level, odd distances are ties and go to the even level
    hu = np.array([-255, -254, -253, -252, -251, -250, -249], dtype=np.int16)
    assert apply_window(hu, (0, 510)).tolist() == [0, 0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("name", sorted(INTENSITY_WINDOWS))
def test_int16_and_float32_give_the_same_bytes(name):
    hu = np.arange(-3100, 3100, dtype=np.int16).reshape(2, 31, 100)
    grey = apply_window(hu, name)
    assert grey.dtype == np.uint8 and grey.shape == hu.shape
    assert np.array_equal(grey, apply_window(hu.astype(np.float32), name))
    assert (np.diff(grey.ravel().astype(int)) >= 0).all()
    centre, width = INTENSITY_WINDOWS[name]
    limits = np.array([centre - width / 2, centre + width / 2], dtype=np.float32)
    assert apply_window(limits, name).tolist() == [0, 255]
    assert apply_window(limits + [1.01 * width / 255, -1.01 * width / 255], name).tolist() == [1, 254]


def test_the_input_is_left_alone():
    hu = np.full((2, 2), 40, dtype=np.float32)
    apply_window(hu)
    assert (hu == 40).all()


def test_lung_window_keeps_lung_apart_from_air_and_soft_tissue_does_not():
    hu = np.array([-1000, -850], dtype=np.int16)
    assert np.ptp(apply_window(hu, "lung").astype(int)) > 20
    assert np.ptp(apply_window(hu, "soft_tissue").astype(int)) == 0


@pytest.mark.parametrize("window", ["brain", (40.0, 0.0), (np.nan, 400.0), (1.0, 2.0, 3.0)])
def test_unknown_windows_are_refused(window):
    with pytest.raises(ValueError, match="intensity window"):
        window_centre_width(window)


def test_nan_has_no_grey_level():
    with pytest.raises(ValueError, match="NaN"):
        apply_window(np.array([0.0, np.nan], dtype=np.float32))
