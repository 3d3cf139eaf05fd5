import numpy as np
import pytest
import torch

from tests.prepared_release import SIZE, make_prepared_release
from vlm3d_ext.data.batch_slots import BatchMemory
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.kept_files import KeptFiles
from vlm3d_ext.data.prepared_case import PreparedCaseError, read_prepared_npz
from vlm3d_ext.transforms import LoadPreparedCased


@pytest.mark.parametrize("num_windows", [1, 3])
def test_a_case_as_tensors(tmp_path, num_windows):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1), num_windows)).cases("training")[0]
    arrays = read_prepared_npz(case["image"])
    loaded = LoadPreparedCased()(case)
    assert loaded["image"].shape == (num_windows, *SIZE) and loaded["image"].dtype == torch.uint8
    np.testing.assert_array_equal(loaded["image"].numpy(), arrays.imgs.reshape(num_windows, *SIZE))
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


@pytest.mark.parametrize("cache_mib", [0, 1])
@pytest.mark.parametrize("num_windows", [1, 3])
def test_it_reads_into_the_slot_where_that_has_its_shape(tmp_path, num_windows, cache_mib):
    cases = CaseManifest(make_prepared_release(tmp_path, (3, 1, 1), num_windows, sizes={3: (4, 16, 18)})).cases(
        "training"
    )
    load, memory = LoadPreparedCased(), BatchMemory()
    if cache_mib:
        load.kept_files = KeptFiles(cache_mib)
    for case in cases:
        expected, slot = LoadPreparedCased()(case), memory.slot(2)
        load.slot = slot.sample(1)
        loaded = load(case)
        fits = case is cases[1]  # nothing is known of the first, and the third has another shape
        for name in ("image", "anatomical_mask"):
            assert torch.equal(loaded[name], expected[name])
            assert (name in slot.tensors and slot.holds(name, 1, loaded[name])) == fits


def test_what_is_kept_in_memory_cannot_be_changed_through_a_sample(tmp_path):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")[0]
    load = LoadPreparedCased()
    load.kept_files = KeptFiles(1)
    before = load(case)["image"].clone()
    load(case)["image"].zero_()
    assert torch.equal(load(case)["image"], before)
