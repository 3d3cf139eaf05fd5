import csv
import json

import numpy as np
import pytest

from vlm3d_ext.data.challenge_classification import read_challenge_predictions
from vlm3d_ext.data.prediction_store import PredictionStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.engines.prediction_tables import write_prediction_tables
from vlm3d_ext.text.label_set import load_label_set

CT_RATE = load_label_set("ct_rate_18").names
VOLUMES = ("valid_1_a_1", "valid_1_a_2", "valid_2_a_1")


def make_store(folder, names=CT_RATE, seed=0):
    """Return a store, and the probabilities (volumes, findings) and thresholds in it; one value is at its threshold."""
    generator = np.random.default_rng(seed)
    probabilities, thresholds = generator.random((3, len(names))), generator.uniform(0.1, 0.9, len(names))
    probabilities[0, 0] = thresholds[0]
    store = PredictionStore(folder, {"fingerprint": "f"})
    for volume_id, row in zip(VOLUMES[::-1], probabilities[::-1], strict=True):
        store.write(volume_id, names, row, thresholds, row >= thresholds, [True] * len(names))
    return store, probabilities, thresholds


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], dtype=float)


def test_csv_tables_hold_all_findings_of_all_volumes(tmp_path):
    store, probabilities, thresholds = make_store(tmp_path)
    write_prediction_tables(store)
    header, volumes, values = read_csv(tmp_path / "tables" / "probabilities.csv")
    assert header == ["VolumeName", *CT_RATE] and volumes == list(VOLUMES)
    np.testing.assert_array_equal(values, probabilities)
    header, volumes, values = read_csv(tmp_path / "tables" / "predictions.csv")
    assert header == ["VolumeName", *CT_RATE] and volumes == list(VOLUMES)
    np.testing.assert_array_equal(values, probabilities >= thresholds)


def test_the_challenge_file_decides_the_same_at_one_half(tmp_path):
    """Also where the findings were scored in another order, and with others between them."""
    names = (*CT_RATE[9:], "Cyst", *CT_RATE[:9])
    store, probabilities, thresholds = make_store(tmp_path, names)
    write_prediction_tables(store)
    predictions = read_challenge_predictions(tmp_path / "tables" / "challenge_classification.json", CT_RATE)
    assert predictions.volume_ids == VOLUMES and predictions.warnings == ()
    columns = [names.index(name) for name in CT_RATE]
    decided = (probabilities >= thresholds)[:, columns]
    np.testing.assert_array_equal(predictions.probabilities >= 0.5, decided)
    own = probabilities[:, columns]
    for column in range(18):
        np.testing.assert_array_equal(np.argsort(predictions.probabilities[:, column]), np.argsort(own[:, column]))
    assert "Cyst" in read_csv(tmp_path / "tables" / "probabilities.csv")[0]


def test_without_all_its_findings_there_is_no_challenge_file(tmp_path, caplog):
    store, _, _ = make_store(tmp_path, CT_RATE[:16])
    with caplog.at_level("INFO"):
        write_prediction_tables(store)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["predictions.csv", "probabilities.csv"]
    assert f"No challenge file: {CT_RATE[16]}, {CT_RATE[17]} of ct_rate_18 not scored" in caplog.text


def test_nothing_predicted_writes_nothing(tmp_path):
    write_prediction_tables(PredictionStore(tmp_path, {"fingerprint": "f"}))
    assert [path.name for path in tmp_path.iterdir()] == ["classification.json"]


@pytest.mark.parametrize("broken", ["cut", "lacks", "number"])
def test_a_broken_file_is_named_and_no_table_is_written(tmp_path, broken):
    store, _, _ = make_store(tmp_path)
    path = store.path(VOLUMES[1])
    content = json.loads(path.read_text())
    if broken == "cut":
        path.write_text(path.read_text()[:300])
    else:
        if broken == "lacks":
            del content["findings"]["Lung nodule"]
        else:
            content["findings"]["Lung nodule"] = 0.5
        path.write_text(json.dumps(content))
    with pytest.raises(ResultStoreError, match=r"valid_1_a_2\.json: .*; delete it and run again\.") as caught:
        write_prediction_tables(store)
    assert "\n" not in str(caught.value) and not (tmp_path / "tables").exists()
