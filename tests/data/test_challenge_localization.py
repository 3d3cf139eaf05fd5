import json

import numpy as np
import pytest

from vlm3d_ext.data.challenge_localization import (
    boxes_of_mask,
    read_challenge_localization,
    volume_box_mm,
    write_challenge_localization,
)
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.text.disease_set import load_disease_set

DISEASES = load_disease_set()
NAMES = [disease.challenge_name for disease in DISEASES.diseases]
BOX = {"bbox_mm": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "probability": 0.5}


def lesions(**given):
    return {key: given.get(key, []) for key in DISEASES.keys}


def scan(name, **given):
    return {"input_image_name": name, **{key: [] for key in NAMES}, **given}


def nodules(*boxes):
    return scan("a.mha", **{"Lung nodule": list(boxes)})


def wrapped(*scans):
    return [{"outputs": [{"type": "predictions", "value": {"predictions": list(scans)}}]}]


def write(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_written_json_is_the_challenges(tmp_path):
    path = tmp_path / "p.json"
    entry = {**BOX, "centroid_mm": [0, 0, 0], "num_voxels": 3, "volume_ml": 0.1}
    write_challenge_localization(
        path,
        {"valid_1_a_1": lesions(ground_glass_opacity=[entry]), "x/valid_2_a_1.nii.gz": lesions()},
        {"valid_1_a_1": (-10.0, 0.5, 1.0), "x/valid_2_a_1.nii.gz": [0, 0, 0]},
    )
    assert json.loads(path.read_text()) == wrapped(
        {
            "input_image_name": "valid_1_a_1.mha",
            "Pericardial effusion": [],
            "Pleural effusion": [],
            "Consolidation": [],
            "Ground glass opacity": [{"bbox_mm": [11.0, 1.5, 2.0, 4.0, 5.0, 6.0], "probability": 0.5}],
            "Lung nodule": [],
        },
        scan("valid_2_a_1.mha"),
    )


def test_positions_are_counted_from_the_volumes_corner_whatever_its_axes(tmp_path):
    """A lesion at the patient's lowest corner lies at 0, 0, 0, and one that fills the volume has the volume's size."""
    shape = (5, 6, 7)
    for number, signs in enumerate([(1, 1, 1), (-1, -1, 1), (1, -1, -1)]):
        affine = np.diag([*(np.array(signs) * (0.5, 0.75, 2.0)), 1.0])
        affine[:3, 3] = [100, -50, 30]
        geometry = VolumeGeometry(shape, affine)
        low = tuple(0 if sign > 0 else -1 for sign in reversed(signs))
        mask = np.zeros(shape, dtype=bool)
        mask[low] = True
        found = lesions(
            lung_nodule=boxes_of_mask(mask, geometry), consolidation=boxes_of_mask(np.ones(shape), geometry)
        )
        path = tmp_path / f"{number}.json"
        write_challenge_localization(path, {"a": found}, {"a": volume_box_mm(geometry)[:3]})
        read = read_challenge_localization(path)
        assert read.warnings == ()
        np.testing.assert_allclose(read.volumes["a"]["lung_nodule"].bbox_mm, [[0, 0, 0, 0.5, 0.75, 2]], atol=1e-9)
        np.testing.assert_allclose(read.volumes["a"]["consolidation"].bbox_mm, [[0, 0, 0, 3.5, 4.5, 10]], atol=1e-9)


def test_what_is_written_is_read_back(tmp_path):
    generator = np.random.default_rng(0)
    given = {}
    for number in range(4):
        counts = generator.integers(0, 4, len(DISEASES.keys))
        given[f"valid_{number}_a_1"] = {
            key: [
                {"bbox_mm": generator.uniform(1, 99, 6).tolist(), "probability": float(generator.random())}
                for _ in range(count)
            ]
            for key, count in zip(DISEASES.keys, counts, strict=True)
        }
    write_challenge_localization(tmp_path / "p.json", given, dict.fromkeys(given, (0, 0, 0)))
    read = read_challenge_localization(tmp_path / "p.json")
    assert list(read.volumes) == list(given) and read.warnings == ()
    for volume_id, of_volume in given.items():
        for key, entries in of_volume.items():
            boxes = read.volumes[volume_id][key]
            assert boxes.bbox_mm.shape == (len(entries), 6)
            assert boxes.bbox_mm.tolist() == [entry["bbox_mm"] for entry in entries]
            assert boxes.probabilities.tolist() == [entry["probability"] for entry in entries]


def test_a_missing_probability_is_one_as_in_the_challenge(tmp_path):
    read = read_challenge_localization(write(tmp_path, wrapped(nodules({"bbox_mm": BOX["bbox_mm"]}))))
    assert read.volumes["a"]["lung_nodule"].probabilities.tolist() == [1.0]


def test_what_the_challenge_would_misread_is_said(tmp_path):
    absolute = {"bbox_mm": [-120.0, -80, -900, 10, 10, 10], "probability": 1}
    content = {"predictions": [nodules(absolute), scan("b.nii.gz"), scan("c")]}
    path = write(tmp_path, content)
    assert read_challenge_localization(path).warnings == (
        f"{path}: lacks the wrapping [{{'outputs': ...}}], which the challenge needs",
        f"{path}: 1 name(s) the challenge would not recognise, such as 'b.nii.gz': it takes off '.mha' only",
        f"{path}: boxes begin outside of 1 volume(s) (a); positions are counted from the volume's corner, not absolute",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"results": []}, "has no list 'predictions'"),
        ([{"outputs": []}], "has no list 'predictions'"),
        (wrapped(), "'predictions' is empty"),
        (wrapped(["a"]), "prediction 0 has the 'input_image_name' None"),
        (wrapped(scan(" ")), "prediction 0 has the 'input_image_name' ' '"),
        (wrapped(scan("a"), scan("a.mha")), "prediction 1 and prediction 0 are both of a; keep one"),
        (wrapped({"input_image_name": "a"}), r"prediction 0 \(a\): 'Pericardial effusion' is missing, expected a list"),
        (wrapped(scan("a", Consolidation=None)), "'Consolidation' is None, expected a list"),
        (
            wrapped(scan("a", **{"Ground-glass opacity": []})),
            r"'Ground-glass opacity' \(nearest: 'Ground glass opacity'",
        ),
        (wrapped(nodules([1, 2, 3, 4, 5, 6])), "Lung nodule, box 0 has the 'bbox_mm' None"),
        (wrapped(nodules(BOX, {"bbox_mm": [1, 2, 3, 4, 5]})), r"box 1 has the 'bbox_mm' \[1, 2, 3, 4, 5\], expected"),
        (wrapped(nodules({"bbox_mm": [1, 2, 3, 4, float("nan"), 6]})), "expected .xmin, ymin, zmin, dx, dy, dz. in mm"),
        (wrapped(nodules({"bbox_mm": [1, 2, 3, 4, True, 6]})), "expected .xmin, ymin, zmin, dx, dy, dz. in mm"),
        (wrapped(nodules({"bbox_mm": [5, 5, 5, 9, -9, 9]})), r"has the size \[9, -9, 9\] mm, expected three positive"),
        (wrapped(nodules({**BOX, "probability": 1.5})), "has the probability 1.5, expected a number from 0 to 1"),
        (wrapped(nodules({**BOX, "probability": None})), "has the probability None"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_challenge_localization(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "corners", "message"),
    [
        ({"a": {"lung_nodule": []}}, {"a": (0, 0, 0)}, "the disease 'consolidation' of a is missing"),
        ({"a": {**lesions(), "nodule": []}}, {"a": (0, 0, 0)}, "the disease 'nodule' of a is unknown"),
        (
            {"a": lesions(), "a.mha": lesions()},
            dict.fromkeys(("a", "a.mha"), (0, 0, 0)),
            "'a' and 'a.mha' are both of a",
        ),
        ({"a": lesions()}, {}, "the corner of a is None, expected x, y, z in mm"),
        ({"a": lesions(lung_nodule=[{**BOX, "probability": -0.1}])}, {"a": (0, 0, 0)}, "has the probability -0.1"),
        ({"a": lesions(lung_nodule=[{"bbox_mm": [0] * 6}])}, {"a": (0, 0, 0)}, "expected three positive numbers"),
    ],
)
def test_what_would_be_wrong_is_not_written(tmp_path, given, corners, message):
    with pytest.raises(ValueError, match=message):
        write_challenge_localization(tmp_path / "p.json", given, corners)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        read_challenge_localization(tmp_path / "absent.json")
