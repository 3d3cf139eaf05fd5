import json

import numpy as np
import pytest

from vlm3d_ext.data.challenge_classification import read_challenge_predictions, write_challenge_predictions
from vlm3d_ext.text.label_set import load_label_set

LABELS = load_label_set("ct_rate_18").names
PAIR = ("Cardiomegaly", "Emphysema")


def predictions(*entries):
    return {"predictions": [{"input_image_name": name, "probabilities": given} for name, given in entries]}


def write(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_written_json_is_the_challenges(tmp_path):
    path = tmp_path / "p.json"
    write_challenge_predictions(path, ["/input/valid_1_a_1.nii.gz", "valid_2_a_1.mha"], PAIR, [[0.25, 1.0], [0.5, 0.0]])
    assert json.loads(path.read_text()) == {
        "name": "Generated probabilities",
        "type": "Abnormality Classification",
        "version": {"major": 1, "minor": 0},
        "predictions": [
            {"input_image_name": "valid_1_a_1", "probabilities": {"Cardiomegaly": 0.25, "Emphysema": 1.0}},
            {"input_image_name": "valid_2_a_1", "probabilities": {"Cardiomegaly": 0.5, "Emphysema": 0.0}},
        ],
    }
    write_challenge_predictions(path, ["valid_1_a_1"], PAIR, np.array([[0, 1]]), extension=".nii.gz")
    assert json.loads(path.read_text())["predictions"][0]["input_image_name"] == "valid_1_a_1.nii.gz"


@pytest.mark.parametrize("extension", ["", ".nii.gz", ".mha"])
def test_what_is_written_is_read_back_exactly(tmp_path, extension):
    probabilities = np.random.default_rng(0).random((5, 18))
    names = [f"valid_{index}_a_2" for index in range(5)]
    write_challenge_predictions(tmp_path / "p.json", names, LABELS, probabilities, extension)
    read = read_challenge_predictions(tmp_path / "p.json", LABELS)
    assert read.volume_ids == tuple(names) and read.warnings == ()
    np.testing.assert_array_equal(read.probabilities, probabilities)


@pytest.mark.parametrize(
    ("names", "probabilities", "message"),
    [
        (["a"], [[0.5]], r"must be \(1 names, 2 labels\), got \(1, 1\)"),
        (["a", "a.nii.gz"], [[0, 0], [0, 0]], r"each volume must be given once, but \['a'\]"),
        (["a"], [[0.5, 1.5]], "probability of 'Emphysema' for a is 1.5, expected 0 to 1; give probabilities"),
        (["a"], [[0.5, np.nan]], "probability of 'Emphysema' for a is nan"),
    ],
)
def test_what_the_challenge_would_misread_is_not_written(tmp_path, names, probabilities, message):
    with pytest.raises(ValueError, match=message):
        write_challenge_predictions(tmp_path / "p.json", names, PAIR, probabilities)
    assert list(tmp_path.iterdir()) == []


def test_order_of_labels_is_that_asked_for_and_the_platforms_wrapping_is_taken_off(tmp_path):
    content = predictions(("b.nii.gz", {"Emphysema": 0.1, "Cardiomegaly": 1}))
    for wrapped in (content, [{"outputs": [{"value": content}]}]):
        read = read_challenge_predictions(write(tmp_path, wrapped), PAIR)
        assert read.volume_ids == ("b",) and read.probabilities.tolist() == [[1.0, 0.1]]


def test_missing_labels_count_as_zero_with_a_warning(tmp_path):
    path = write(tmp_path, predictions(("a", {"Emphysema": 0.4}), ("b", {"Emphysema": 0.3, "Cardiomegaly": 0.2})))
    read = read_challenge_predictions(path, PAIR)
    assert read.probabilities.tolist() == [[0.0, 0.4], [0.2, 0.3]]
    assert read.warnings == (
        f"{path}: 1 probabilities are missing and count as 0, of ['Cardiomegaly'] in 1 volume(s) (a)",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ({"results": []}, "has no list 'predictions'"),
        ([{"outputs": []}], "has no list 'predictions'"),
        (predictions(), "'predictions' is empty"),
        ({"predictions": [{"input_image_name": "a"}]}, "prediction 0 has no 'probabilities'"),
        ({"predictions": [["a"]]}, "prediction 0 has no 'input_image_name'"),
        (predictions((" ", {})), "empty 'input_image_name'"),
        (
            predictions(("a", {"Emphysemia": 0.5})),
            r"prediction 0 \(a\) has the label 'Emphysemia' \(nearest: 'Emphysema'\)",
        ),
        (predictions(("a", {"Emphysema": 1.01})), "'Emphysema' is 1.01, expected a number from 0 to 1"),
        (predictions(("a", {"Emphysema": float("nan")})), "'Emphysema' is nan"),
        (predictions(("a", {"Emphysema": True})), "'Emphysema' is True"),
        (predictions(("a", {"Emphysema": "0.5"})), "'Emphysema' is '0.5'"),
        (predictions(("a", {}), ("b", {}), ("x/a.nii.gz", {})), "prediction 2 and prediction 0 are both of a"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_bytes(
        content.encode(errors="surrogateescape") if isinstance(content, str) else json.dumps(content).encode()
    )
    with pytest.raises(ValueError, match=message) as error:
        read_challenge_predictions(path, PAIR)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        read_challenge_predictions(tmp_path / "absent.json", PAIR)
