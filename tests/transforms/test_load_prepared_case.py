import numpy as np
import pytest
import torch

from tests.prepared_release import SIZE, make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import PreparedCaseError, read_prepared_npz
from vlm3d_ext.transforms import LoadPreparedCased


@pytest.mark.parametrize("num_windows", [1, 3])
def test_a_case_as_tensors(tmp_path, num_windows):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1), num_windows)).cases("training")[0]
    arrays = read_prepared_npz(case["image"])
    loaded = LoadPreparedCased()(case)
    assert loaded["image"].shape == (num_windows, *SIZE) and loaded["image"].dtype == torch.float32
    np.testing.assert_array_equal((loaded["image"] * 255).round().numpy(), arrays.imgs.reshape(num_windows, *SIZE))
    assert 0 <= loaded["image"].min() and loaded["image"].max() <= 1
    np.testing.assert_array_equal(loaded["anatomical_mask"].numpy(), arrays.gts)
    assert loaded["spacing_mm"].tolist() == [5.0, 2.0, 2.0]
    assert loaded["volume_id"] == "train_1_a_1" and loaded["report"] == case["report"]


def test_labels_and_the_mask_that_is_not_there(tmp_path):
    manifest = CaseManifest(make_prepared_release(tmp_path, (4, 1, 1)))
    cases = manifest.cases("training")
    first, fourth = LoadPreparedCased()(cases[0]), LoadPreparedCased()(cases[3])
    assert first["has_anatomical_mask"].item() is True and fourth["has_anatomical_mask"].item() is False
    assert fourth["anatomical_mask"].max() == 0
    names = manifest.label_names
    assert first["labels"][names.index("Pleural effusion")] == 1
    assert fourth["labels"][names.index("Pleural effusion")] == 0
    assert torch.isnan(first["labels"]).nonzero().tolist() == [[names.index("Hiatal hernia")]]


def test_the_case_itself_is_left_alone(tmp_path):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("test")[0]
    before = dict(case)
    LoadPreparedCased()(case)
    assert case == before


def test_a_damaged_file_is_named(tmp_path):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")[0]
    with open(case["image"], "r+b") as file:
        file.truncate(100)
    with pytest.raises(PreparedCaseError, match=r"train_1_a_1\.npz"):
        LoadPreparedCased()(case)


def test_further_entries_are_handed_on_where_the_case_has_them(tmp_path):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")[0]
    loaded = LoadPreparedCased(keep=["geometry", "lesion_masks", "crop_disease"])({**case, "lesion_masks": {"a": "b"}})
    assert loaded["geometry"] == case["geometry"] and loaded["lesion_masks"] == {"a": "b"}
    assert "crop_disease" not in loaded and "geometry" not in LoadPreparedCased()(case)
