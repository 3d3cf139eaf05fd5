import json

import pytest

from tests.data.lesion_manifest import lesion_case, write_lesion_manifest
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.preparation_record import PreparationRecord


def record(folder, settings):
    path = write_lesion_manifest(folder, training=[lesion_case("a", labels={})])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content if settings is None else {**content, "settings": settings}))
    return PreparationRecord(CaseManifest(path))


def test_settings_travel_as_plain_types_and_are_recognised(tmp_path):
    settings = {"target_size": [64, 512, 512], "windows": ["soft_tissue"], "depth_policy": "resample"}
    state = record(tmp_path / "a", settings).state_dict()
    assert state == {"settings": settings} and json.loads(json.dumps(state)) == state
    record(tmp_path / "b", settings).load_state_dict(state)


def test_what_differs_is_named_with_both_values(tmp_path):
    theirs = record(
        tmp_path / "a", {"target_size": [64, 512, 512], "windows": ["soft_tissue"], "level": 1}
    ).state_dict()
    ours = record(tmp_path / "b", {"target_size": [32, 256, 256], "windows": ["soft_tissue"], "policy": "crop"})
    with pytest.raises(ValueError, match="prepared otherwise") as raised:
        ours.load_state_dict(theirs)
    message = str(raised.value)
    assert "level is 1 there and None here; policy is None there and 'crop' here" in message
    assert "target_size is [64, 512, 512] there and [32, 256, 256] here" in message and "windows" not in message
    assert ours.settings["target_size"] == [32, 256, 256]  # nothing is changed


def test_a_manifest_that_does_not_say_how_it_was_made_agrees_with_its_like_only(tmp_path):
    unsaid = record(tmp_path / "a", None)
    assert unsaid.state_dict() == {"settings": {}}
    unsaid.load_state_dict(record(tmp_path / "b", None).state_dict())
    with pytest.raises(ValueError, match="level is 1 there and None here"):
        unsaid.load_state_dict({"settings": {"level": 1}})
