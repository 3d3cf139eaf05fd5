import nibabel as nib
import numpy as np
import pytest

from vlm3d_ext.data.challenge_localization import write_challenge_localization
from vlm3d_ext.engines.challenge_localization_truth import read_scan_list, true_boxes_of_file, true_boxes_of_masks
from vlm3d_ext.text.disease_set import load_disease_set

DISEASES = load_disease_set()
SHAPE_IJK = (12, 10, 8)


def save(folder, disease, name, mask_ijk, affine_ras):
    path = folder / disease / f"{name}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(mask_ijk.astype(np.uint8), affine_ras), path)


def test_boxes_are_counted_from_the_corner_whatever_the_file_s_axes(tmp_path):
    """One voxel at the patient's far right, front and foot: LPS x, y and z are lowest there."""
    for name, signs in {"ras": (1, 1, 1), "lps": (-1, -1, 1), "las": (-1, 1, 1), "rai": (1, 1, -1)}.items():
        affine = np.diag([*(np.array(signs) * (0.5, 0.75, 2.0)), 1.0])
        affine[:3, 3] = (40, -30, 700)
        mask = np.zeros(SHAPE_IJK)
        # In RAS+ voxels, right = low i... LPS x is low where RAS x is high.
        low = [-1 if signs[0] > 0 else 0, -1 if signs[1] > 0 else 0, 0 if signs[2] > 0 else -1]
        mask[tuple(low)] = 1
        mask[tuple(slice(5, 7) for _ in range(3))] = 3  # instances are lesions too
        save(tmp_path, "lung_nodule", name, mask, affine)
    truth = true_boxes_of_masks(tmp_path, DISEASES)
    assert truth.volume_ids() == ["las", "lps", "rai", "ras"] and truth.remarks == ()
    for boxes in truth.boxes["lung_nodule"].values():
        assert boxes.shape == (2, 6)
        at_corner = boxes[boxes[:, 3].argmin()]
        np.testing.assert_allclose(at_corner, [0, 0, 0, 0.5, 0.75, 2.0], atol=1e-4)
    for extent in truth.extents_mm.values():
        np.testing.assert_allclose(extent, [6, 7.5, 16], atol=1e-4)


def test_what_is_known_and_what_is_not(tmp_path):
    save(tmp_path, "lung_nodule", "a", np.zeros(SHAPE_IJK), np.eye(4))
    save(tmp_path, "consolidation", "b", np.ones(SHAPE_IJK), np.eye(4))
    save(tmp_path, "nodules", "c", np.ones(SHAPE_IJK), np.eye(4))
    truth = true_boxes_of_masks(tmp_path, DISEASES)
    assert {key: list(of) for key, of in truth.boxes.items() if of} == {"lung_nodule": ["a"], "consolidation": ["b"]}
    assert truth.boxes["lung_nodule"]["a"].shape == (0, 6)
    assert truth.remarks == (f"{tmp_path}: folders of no disease of the set, not read: ['nodules']",)
    listed = truth.restricted_to(["b", "d"])
    assert all(set(of) == {"b", "d"} for of in listed.boxes.values())
    assert [key for key, of in listed.boxes.items() if len(of["b"])] == ["consolidation"]


def test_masks_that_cannot_be_the_truth_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        true_boxes_of_masks(tmp_path / "absent", DISEASES)
    with pytest.raises(ValueError, match="has no mask, expected <disease>/<volume_id>"):
        true_boxes_of_masks(tmp_path, DISEASES)
    save(tmp_path, "consolidation", "a", np.ones(SHAPE_IJK), np.eye(4))
    save(tmp_path, "lung_nodule", "a", np.ones(SHAPE_IJK), np.diag([1, 1, 2, 1]))
    with pytest.raises(ValueError, match=r"lung_nodule/a\.nii\.gz: fills the box .* expected one grid for a volume"):
        true_boxes_of_masks(tmp_path, DISEASES)


def test_a_file_s_empty_lists_are_knowledge(tmp_path):
    nodule = {"bbox_mm": [1, 2, 3, 4, 5, 6], "probability": 1}
    given = {name: {key: [] for key in DISEASES.keys} for name in ("a", "b")}
    given["a"]["lung_nodule"] = [nodule]
    write_challenge_localization(tmp_path / "t.json", given, dict.fromkeys(given, (0, 0, 0)))
    truth = true_boxes_of_file(tmp_path / "t.json", DISEASES)
    assert truth.volume_ids() == ["a", "b"] and truth.extents_mm == {}
    assert truth.boxes["lung_nodule"]["a"].tolist() == [nodule["bbox_mm"]]
    assert all(of["b"].shape == (0, 6) for of in truth.boxes.values())


@pytest.mark.parametrize(
    "text",
    [
        "a\nb.nii.gz\n\nx/c.mha.nii.gz\na\n",
        "VolumeName,Lung nodule\na.nii.gz,1\nb,0\nc.mha,\n",
        "split,volume_id\ntest,a\ntest,b\ntest,c.mha\n",
        "\ufeffAccessionNo\r\na\r\nb\r\nc.mha\r\n",
    ],
)
def test_lists_of_scans(tmp_path, text):
    path = tmp_path / "scans.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_scan_list(path) == ("a", "b", "c.mha")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no volume id, expected one a line"),
        (b"VolumeName\n", "has no volume id"),
        (b"name,split\na,test\n", r"has the columns \['name', 'split'\], expected one of"),
        (b"\xff\xfe\x00", "is no text"),
    ],
)
def test_bad_lists_are_refused(tmp_path, content, message):
    path = tmp_path / "scans.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_scan_list(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
