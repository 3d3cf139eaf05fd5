import csv

import numpy as np
import pytest

from tests.engines.drawn_cases import DISEASES, SOURCE, ball
from vlm3d_ext.data.challenge_localization import read_challenge_localization
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.engines.localization_tables import write_localization_tables

BIG, SMALL = ball((10, 12, 12), 9.0), ball((6, 27, 30), 5.0)


def write(store, volume_id, nodules, effusion=None):
    probabilities = {"lung_nodule": np.asarray(nodules, dtype=np.float32)}
    probabilities["pleural_effusion"] = np.zeros(SOURCE.shape, np.float32) if effusion is None else effusion
    store.write(volume_id, probabilities, dict.fromkeys(probabilities, 0.5), SOURCE)


def test_each_lesion_has_a_row_and_a_box(tmp_path):
    store = LocalizationStore(tmp_path, {"f": 1})
    write(store, "train_2_a_1", 0.6 * BIG + 0.9 * SMALL)
    write(store, "train_1_a_1", np.zeros(SOURCE.shape))
    write_localization_tables(store, DISEASES)
    with open(tmp_path / "tables" / "lesions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["volume_id"], row["disease"], row["lesion"]) for row in rows] == [
        ("train_2_a_1", "lung_nodule", "1"),
        ("train_2_a_1", "lung_nodule", "2"),
    ]
    assert [float(row["probability"]) for row in rows] == pytest.approx([0.9, 0.6])
    centre = SOURCE.positions_lps(np.array([[6, 27, 30]]))[0]
    assert [float(rows[0][f"centroid_{axis}_mm"]) for axis in "xyz"] == pytest.approx(centre.tolist())
    boxes = read_challenge_localization(tmp_path / "tables" / "challenge_localization.json", DISEASES)
    assert list(boxes.volumes) == ["train_1_a_1", "train_2_a_1"] and boxes.warnings == ()
    nodules = boxes.volumes["train_2_a_1"]["lung_nodule"]
    # There positions are counted from the corner of the volume, in the CSV they are the patient's.
    corner = store.read_volume_box("train_2_a_1")[:3]
    in_csv = [float(rows[0][f"{axis}min_mm"]) for axis in "xyz"]
    np.testing.assert_allclose(nodules.bbox_mm[0, :3] + corner, in_csv)
    assert all(len(of.bbox_mm) == 0 for of in boxes.volumes["train_1_a_1"].values())


def test_nothing_is_written_for_an_empty_store_or_other_diseases(tmp_path):
    store = LocalizationStore(tmp_path, {"f": 1})
    write_localization_tables(store, DISEASES)
    zeros = np.zeros(SOURCE.shape, np.float32)
    store.write("train_1_a_1", {"lung_nodule": zeros}, {"lung_nodule": 0.5}, SOURCE)
    with pytest.raises(ResultStoreError, match=r"train_1_a_1\.json: its diseases are \['lung_nodule'\], expected"):
        write_localization_tables(store, DISEASES)
    assert not (tmp_path / "tables").exists()
