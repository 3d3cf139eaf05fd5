import json

import numpy as np
import pytest

from vlm3d_ext.data.evidence_store import EvidenceStore
from vlm3d_ext.data.result_store import ResultStoreError

ORIGIN = {"encoder_sha256": "a" * 64, "fingerprint": "f", "pooling": 2}
FINDINGS = {
    "Lung nodule": {"probability": 0.8, "threshold": 0.5, "prediction": 1},
    "Emphysema": {"probability": 0.1, "threshold": 0.3, "prediction": 0},
}
LESIONS = [{"disease": "lung_nodule", "regions": ["right_upper_lobe"], "size_mm": 7.25, "probability": None}]
VOLUME = "train_1_a_1"


def make_features(seed=0):
    generator = np.random.default_rng(seed)
    shapes = {"global_features": (6,), "region_features": (3, 6), "local_features": (2, 3, 4, 6)}
    return {name: generator.normal(size=shape) for name, shape in shapes.items()}


def test_evidence_comes_back(tmp_path):
    features = make_features()
    EvidenceStore(tmp_path, ORIGIN).write(VOLUME, {**features, "more": np.zeros(3)}, FINDINGS, LESIONS)
    again = EvidenceStore(tmp_path)
    assert again.origin == ORIGIN
    assert again.read(VOLUME) == {"findings": FINDINGS, "lesions": LESIONS}
    assert list(again.read(VOLUME)["findings"]) == ["Lung nodule", "Emphysema"]  # in the order of the classifier
    read = again.read_features(VOLUME)
    assert set(read) == set(features)
    for name, dtype in {
        "global_features": np.float32,
        "region_features": np.float32,
        "local_features": np.float16,
    }.items():
        assert read[name].dtype == dtype
        np.testing.assert_array_equal(read[name], features[name].astype(dtype))


def test_the_json_is_written_last(tmp_path, monkeypatch):
    """Where the JSON is, the features are: a run that was stopped in between does the volume again."""
    store = EvidenceStore(tmp_path, ORIGIN)
    cases = [{"volume_id": VOLUME}, {"volume_id": "train_2_a_1"}]
    assert store.pending(cases) == cases
    store.write(VOLUME, make_features(), FINDINGS, LESIONS)
    assert store.pending(cases) == cases[1:]
    store.path(VOLUME).unlink()  # what is there when a run is stopped before the last file
    assert store.features_path(VOLUME).is_file() and store.pending(cases) == cases

    seen = []
    monkeypatch.setattr(
        "vlm3d_ext.data.evidence_store.write_json", lambda *_: seen.append(store.features_path(VOLUME).is_file())
    )
    store.features_path(VOLUME).unlink()
    store.write(VOLUME, make_features(), FINDINGS, LESIONS)
    assert seen == [True]


def test_old_evidence_does_not_outlive_a_writing_that_fails(tmp_path):
    store = EvidenceStore(tmp_path, ORIGIN)
    store.write(VOLUME, make_features(), FINDINGS, LESIONS)
    with pytest.raises(KeyError, match="region_features"):
        store.write(VOLUME, {"global_features": np.zeros(6)}, FINDINGS, LESIONS)
    with pytest.raises(ResultStoreError, match=r"train_1_a_1\.json: no readable evidence"):
        store.read(VOLUME)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write(VOLUME, make_features(), {"Lung nodule": {"probability": float("nan")}}, [])
    assert store.pending([{"volume_id": VOLUME}])


def test_evidence_of_other_checkpoints_or_data_is_refused(tmp_path):
    EvidenceStore(tmp_path, ORIGIN)
    with pytest.raises(ResultStoreError, match=r"evidence\.json: the evidence there were made with another pooling;"):
        EvidenceStore(tmp_path, {**ORIGIN, "pooling": 4})
    with pytest.raises(ResultStoreError, match="another fingerprint, localization_sha256;"):
        EvidenceStore(tmp_path, {**ORIGIN, "fingerprint": "g", "localization_sha256": "b"})
    with pytest.raises(ResultStoreError, match="make evidence first with the report_generation bundle"):
        EvidenceStore(tmp_path / "absent")


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"{}", b'{"findings": {}}', b'{"findings": 3, "lesions": []}', b"\xff\xfe"]
)
def test_missing_and_damaged_json_is_named(tmp_path, content):
    store = EvidenceStore(tmp_path, ORIGIN)
    if content is not None:
        store.path(VOLUME).write_bytes(content)
    with pytest.raises(
        ResultStoreError, match=r"train_1_a_1\.json: no readable evidence \(.*\); delete it and run again"
    ):
        store.read(VOLUME)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "text", "lacking", "pickled"])
def test_missing_and_damaged_features_are_named(tmp_path, damage):
    store = EvidenceStore(tmp_path, ORIGIN)
    store.write(VOLUME, make_features(), FINDINGS, LESIONS)
    path = store.features_path(VOLUME)
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "lacking":
        np.savez(path, global_features=np.zeros(6))
    elif damage == "pickled":
        np.savez(path, **{name: np.array([{}], dtype=object) for name in make_features()})
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"features"}[damage])
    with pytest.raises(
        ResultStoreError, match=r"train_1_a_1\.npz: no readable evidence \(.*\); delete it and run again"
    ):
        store.read_features(VOLUME)


def test_the_files_are_the_same_bytes_each_time(tmp_path):
    contents = []
    for folder in ("one", "two"):
        store = EvidenceStore(tmp_path / folder, ORIGIN)
        store.write(VOLUME, make_features(), FINDINGS, LESIONS)
        contents.append([path.read_bytes() for path in sorted((tmp_path / folder).iterdir())])
    assert contents[0] == contents[1] and len(contents[0]) == 3
    assert json.loads(contents[0][0]) == ORIGIN
