import json

import pytest

from vlm3d_ext.data.prediction_store import PredictionStore
from vlm3d_ext.data.result_store import ResultStore, ResultStoreError

ORIGIN = {"classification_sha256": "a" * 64, "prompts": {"Cyst": ["A cyst."]}, "use_anatomical_mask": True}
CASES = [{"volume_id": f"valid_{number}_a_1"} for number in range(3)]


def write(store, volume_id, probability=0.25):
    store.write(volume_id, ["Mass", "Cyst"], [probability, 1.0], [0.5, 0.125], [0, 1], [True, False])


def test_predictions_come_back_as_they_were_written(tmp_path):
    store = PredictionStore(tmp_path / "predictions", ORIGIN)
    write(store, "valid_2_a_1")
    write(store, "valid_1_a_1", 0.75)
    again = PredictionStore(tmp_path / "predictions")
    assert again.volume_ids() == ["valid_1_a_1", "valid_2_a_1"] and again.origin == ORIGIN
    findings = again.read("valid_2_a_1")
    assert list(findings) == ["Mass", "Cyst"]
    assert findings["Mass"] == {"probability": 0.25, "threshold": 0.5, "prediction": 0, "trained": True}
    assert findings["Cyst"] == {"probability": 1.0, "threshold": 0.125, "prediction": 1, "trained": False}
    assert json.loads(again.path("valid_1_a_1").read_text())["volume_id"] == "valid_1_a_1"


def test_names_and_values_that_do_not_match_are_refused_and_leave_no_file(tmp_path):
    store = PredictionStore(tmp_path, ORIGIN)
    with pytest.raises(ValueError, match="argument 3 is shorter"):
        store.write("valid_1_a_1", ["Mass", "Cyst"], [0.1, 0.2], [0.5], [0, 0], [True, True])
    with pytest.raises(ResultStoreError, match=r"valid_1_a_1\.json: the finding 'Mass' is there twice; rename one\."):
        store.write("valid_1_a_1", ["Mass", "Mass"], [0.1, 0.2], [0.5, 0.5], [0, 0], [True, True])
    assert store.volume_ids() == [] and [path.name for path in tmp_path.iterdir()] == ["classification.json"]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    write(PredictionStore(tmp_path, ORIGIN), "valid_1_a_1")
    assert PredictionStore(tmp_path, ORIGIN).pending(CASES) == [CASES[0], CASES[2]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"classification_sha256": "b" * 64}, "classification_sha256"),
        ({"prompts": {"Cyst": ["A lung cyst."]}}, "prompts"),
        ({"use_anatomical_mask": False, "label_set": "vlm3d_18"}, "label_set, use_anatomical_mask"),
    ],
)
def test_results_of_another_origin_are_not_mixed(tmp_path, changes, named):
    store = PredictionStore(tmp_path, ORIGIN)
    write(store, "valid_1_a_1")
    with pytest.raises(ResultStoreError, match=f"the predictions there were made with another {named}; choose another"):
        PredictionStore(tmp_path, {**ORIGIN, **changes})
    assert PredictionStore(tmp_path).origin == ORIGIN


def test_an_origin_is_compared_as_json(tmp_path):
    """A tuple is a list after the round trip; that is no other origin."""
    PredictionStore(tmp_path, {"prompts": ("a", "b")})
    assert PredictionStore(tmp_path, {"prompts": ("a", "b")}).origin == {"prompts": ["a", "b"]}


def test_a_store_that_is_not_there(tmp_path):
    with pytest.raises(
        ResultStoreError, match=r"classification\.json: no such file; make predictions first with the cl"
    ):
        PredictionStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "7", "[1]", '"text"', "\udcff"])
def test_an_index_that_cannot_be_right(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ResultStoreError, match=r"results\.json: not .*; delete .* and make it again") as caught:
        ResultStore(tmp_path, ORIGIN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", '{"findings": {"Mass"', "[]", "{}", '{"findings": 3}', "\udcff"])
def test_a_broken_file_is_named(tmp_path, content):
    store = PredictionStore(tmp_path, ORIGIN)
    store.path("valid_1_a_1").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ResultStoreError, match=r"valid_1_a_1\.json: no readable predictions .*delete it and run again"):
        store.read("valid_1_a_1")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ResultStoreError, match=r"valid_7_a_1\.json: no readable predictions"):
        PredictionStore(tmp_path, ORIGIN).read("valid_7_a_1")
