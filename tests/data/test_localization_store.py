import json

import nibabel as nib
import numpy as np
import pytest

from tests.engines.drawn_cases import SOURCE, ball
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.data.scan_reader import read_mask

ORIGIN = {"localization_sha256": "a" * 64, "fingerprint": "f"}
BIG, SMALL = ball((10, 12, 12), 9.0), ball((6, 27, 30), 5.0)
PROBABILITIES = {
    "lung_nodule": (0.9 * BIG + 0.6 * SMALL).astype(np.float32),
    "pleural_effusion": (0.2 * BIG).astype(np.float32),
}
THRESHOLDS = {"lung_nodule": 0.5, "pleural_effusion": 0.25}


def test_lesions_come_back_with_masks_on_the_scans_grid(tmp_path):
    store = LocalizationStore(tmp_path, ORIGIN)
    store.write("train_1_a_1", PROBABILITIES, THRESHOLDS, SOURCE, montage=b"picture")
    again = LocalizationStore(tmp_path)
    assert again.origin == ORIGIN and again.volume_ids() == ["train_1_a_1"]
    read = again.read("train_1_a_1")
    nodule = read["lung_nodule"]
    assert nodule["threshold"] == 0.5 and nodule["num_voxels"] == BIG.sum() + SMALL.sum()
    voxel_ml = 1.5 * 1.5 * 3.0 / 1000
    assert nodule["volume_ml"] == pytest.approx(nodule["num_voxels"] * voxel_ml)
    assert [lesion["num_voxels"] for lesion in nodule["lesions"]] == [BIG.sum(), SMALL.sum()]
    assert [lesion["probability"] for lesion in nodule["lesions"]] == pytest.approx([0.9, 0.6])
    assert read["pleural_effusion"] == {"threshold": 0.25, "num_voxels": 0, "volume_ml": 0.0, "lesions": []}
    centre = SOURCE.positions_lps(np.array([[10, 12, 12]]))[0]
    np.testing.assert_allclose(nodule["lesions"][0]["centroid_mm"], centre, atol=1e-6)
    box = again.read_volume_box("train_1_a_1")
    assert box[3:] == pytest.approx([60.0, 54.0, 60.0])
    image = nib.load(again.mask_path("lung_nodule", "train_1_a_1"))
    np.testing.assert_allclose(image.affine, SOURCE.affine_ras)
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, BIG | SMALL)
    assert not read_mask(again.mask_path("pleural_effusion", "train_1_a_1"))[0].any()
    assert again.montage_path("train_1_a_1").read_bytes() == b"picture"


def test_the_json_comes_last_and_an_old_one_does_not_outlive_its_masks(tmp_path):
    store = LocalizationStore(tmp_path, ORIGIN)
    store.write("train_1_a_1", PROBABILITIES, THRESHOLDS, SOURCE)
    wrong = {**PROBABILITIES, "pleural_effusion": np.zeros((2, 3, 4), np.float32)}
    with pytest.raises(ValueError, match="shape"):
        store.write("train_1_a_1", wrong, THRESHOLDS, SOURCE)
    assert store.volume_ids() == []
    assert store.pending([{"volume_id": "train_1_a_1"}]) == [{"volume_id": "train_1_a_1"}]


@pytest.mark.parametrize("threshold", [None, 0.0, 1.5, float("nan")])
def test_without_a_threshold_nothing_is_written(tmp_path, threshold):
    store = LocalizationStore(tmp_path, ORIGIN)
    thresholds = {**THRESHOLDS, "pleural_effusion": threshold}
    with pytest.raises(ResultStoreError, match=rf"train_1_a_1\.json: the threshold of pleural_effusion is {threshold}"):
        store.write("train_1_a_1", PROBABILITIES, thresholds, SOURCE)
    assert [path.name for path in tmp_path.iterdir()] == ["localization.json"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    store = LocalizationStore(tmp_path, ORIGIN)
    store.path("train_1_a_1").write_text(json.dumps({"diseases": {"lung_nodule": {}}}))
    with pytest.raises(ResultStoreError, match=r"train_1_a_1\.json: no readable lesions \('volume_box_mm'\); delete"):
        store.read("train_1_a_1")
    with pytest.raises(ResultStoreError, match="lesion masks there were made with another fingerprint"):
        LocalizationStore(tmp_path, {**ORIGIN, "fingerprint": "g"})
    with pytest.raises(ResultStoreError, match=r"make lesion masks first with the localization bundle's inference"):
        LocalizationStore(tmp_path / "absent")
