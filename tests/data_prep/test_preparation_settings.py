import json

import pytest

from data_prep.anatomical_masks import MaskCoding
from data_prep.preparation_settings import PreparationSettings

SETTINGS = PreparationSettings(
    spatial_size=(8, 16, 18), depth_policy="crop", spacing_mm=(3.0, 2.0, 1.5), windows=("wide", "lung"), check_hu=False
)


@pytest.mark.parametrize("settings", [PreparationSettings(), SETTINGS])
def test_settings_come_back_from_their_json(settings):
    content = {**json.loads(json.dumps(settings.to_dict())), "layout": "ct_rate", "seed": 3}
    assert PreparationSettings.from_dict(content) == settings
    assert PreparationSettings.from_dict(content).digest == settings.digest


def test_the_coding_of_masks_comes_back():
    settings = PreparationSettings(mask_coding=MaskCoding("regions", 1))
    assert PreparationSettings.from_dict(settings.to_dict()).mask_coding == MaskCoding("regions", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, r"prepared in format 99, expected 2; train on data prepared with this version"),
        ({"window": ["x_ray"]}, r"no intensity window is called 'x_ray'; the names are \['bone'"),
        ({"window": "wide"}, r"window must be a list of names of intensity windows, got 'wide'"),
        ({"window_centre_width_hu": [[1.0, 2.0]]}, r"window_centre_width_hu \[\[1.0, 2.0\]\], which is"),
        ({"pleura_thickness_mm": 7.0}, "pleura_thickness_mm 7.0, which is 4.0 here"),
        ({"spatial_size": [8, 16]}, r"spatial_size must be three numbers \[z, y, x\], got \[8, 16\]"),
        ({"spatial_size": None}, r"spatial_size must be three numbers \[z, y, x\], got None"),
        ({"depth_policy": "squeeze"}, "depth-policy must be one of .* got 'squeeze'"),
        ({"mask_coding": {"scheme": 1}}, "mask_coding is {'scheme': 1}, expected {'labels'"),
        ({"mask_coding": None}, "mask_coding is None, expected {'labels'"),
    ],
)
def test_what_would_give_other_voxels_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PreparationSettings.from_dict({**SETTINGS.to_dict(), **changes})


def test_missing_keys_are_named():
    content = SETTINGS.to_dict()
    del content["window"], content["check_hu"]
    with pytest.raises(ValueError, match="; window, check_hu missing; take the 'settings' of the training data's"):
        PreparationSettings.from_dict(content)
