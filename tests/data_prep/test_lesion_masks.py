import numpy as np
import pytest

from data_prep.lesion_masks import find_lesion_masks, read_lesion_mask
from data_prep.raw_case import RawCase
from tests.data_prep.tiny_release import GEOMETRY, chest_hu, write_volume
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.scan_reader import read_scan
from vlm3d_ext.data.volume_geometry import VolumeGeometry


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def case_of(path):
    return RawCase("s1", "s1", "s1", "test", path, path.name)


def test_both_forms_are_found(tmp_path):
    nodule = touch(tmp_path / "lung_nodule" / "s1.nii.gz")
    effusion = touch(tmp_path / "s1_pleural_effusion_mask.nii.gz")
    nested = touch(tmp_path / "consolidation" / "train_fixed" / "s2.nii")
    touch(tmp_path / "lung_nodul" / "s1.nii.gz")
    touch(tmp_path / "lung_nodule" / "notes.txt")

    index = find_lesion_masks(tmp_path)

    # The order is that of the diseases, whatever the folder says.
    assert list(index.masks_of(case_of(tmp_path / "s1.nii.gz")).items()) == [
        ("pleural_effusion", effusion),
        ("lung_nodule", nodule),
    ]
    assert index.by_volume["s2"] == {"consolidation": (nested,)}
    assert "'lung_nodul'" in index.remarks[0] and len(index.remarks) == 1


def test_two_masks_of_one_disease_are_refused(tmp_path):
    touch(tmp_path / "lung_nodule" / "s1.nii.gz")
    touch(tmp_path / "s1_lung_nodule_mask.nii.gz")

    with pytest.raises(UnusableScanError, match="two lung_nodule masks of s1"):
        find_lesion_masks(tmp_path).masks_of(case_of(tmp_path / "s1.nii.gz"))


def test_instances_become_binary_and_another_grid_is_refused(tmp_path):
    scan_file = write_volume(tmp_path / "s1.nii.gz", chest_hu(0))
    scan = read_scan(scan_file)
    labels = np.zeros(GEOMETRY.shape, dtype=np.int16)
    labels[2, 3, 4], labels[5:7, 8, 9] = 1, 300
    mask = write_volume(tmp_path / "m.nii.gz", labels)

    np.testing.assert_array_equal(read_lesion_mask(mask, scan, case_of(scan_file)), labels > 0)
    write_volume(mask, labels, VolumeGeometry.from_spacing(GEOMETRY.shape, (5.0, 4.0, 4.1)))
    with pytest.raises(UnusableScanError, match=r"4\.1.*its scan.*4\.0"):
        read_lesion_mask(mask, scan, case_of(scan_file))
