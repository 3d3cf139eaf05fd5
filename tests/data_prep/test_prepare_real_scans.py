"""The preparation on real scans: ../shared/data beside the repository, skipped where it is not there."""

import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.prepare import main
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import read_prepared_npz
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import restore_mask

SHARED = Path(__file__).parents[3] / "shared" / "data"
SIZE = ["--spatial-size", "32", "128", "128"]

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sample data are not there")


def prepare(source, output, *more):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", "0", *more])


def case_of(output, volume_id):
    sidecar = json.loads((output / "volumes" / f"{volume_id}.json").read_text())
    return (
        read_prepared_npz(output / "volumes" / f"{volume_id}.npz"),
        VolumeGeometry.from_dict(sidecar["prepared_geometry"]),
    )


def test_a_chest_from_nifti_keeps_left_and_right_up_and_down(tmp_path):
    assert prepare(SHARED / "ct_chest" / "nsclc_LUNG1-001" / "ct.nii.gz", tmp_path, "--window", "wide") == 0

    imgs = case_of(tmp_path, "ct")[0].imgs.astype(float)
    lower = imgs[4:14]
    heart_side, other_side = lower[:, 40:70, 64:84], lower[:, 40:70, 44:64]
    assert heart_side.mean() > other_side.mean(), "the heart lies left, where x grows"
    air = (imgs[:, 45:85, 20:108] < 60).mean(axis=(1, 2))
    assert air[16] > 2 * air[-1] and air[16] > 2 * air[0], "lungs are widest in the middle"
    bright = np.argwhere(imgs[8] > 200)
    assert bright[:, 0].mean() > 64, "the spine lies towards the back, where y grows"


def test_dicom_and_nifti_of_one_scan_agree(tmp_path):
    folder = SHARED / "ct_chest" / "ibsi_pat1"
    with zipfile.ZipFile(folder / "tutorial_radiomics_chest_ct_data.zip") as archive:
        archive.extractall(tmp_path / "raw")

    assert prepare(tmp_path / "raw" / "chest_ct" / "image", tmp_path / "dicom") == 0
    assert prepare(folder / "phantom.nii.gz", tmp_path / "nifti") == 0

    (dicom, dicom_grid), (nifti, nifti_grid) = (
        case_of(tmp_path / "dicom", "image"),
        case_of(tmp_path / "nifti", "phantom"),
    )
    assert dicom_grid.is_close(nifti_grid, tolerance_mm=0.01)
    np.testing.assert_array_equal(dicom.imgs, nifti.imgs)


def test_compressed_dicom_with_totalsegmentators_mask(tmp_path):
    source = SHARED / "ct_organs_totalsegmentator"
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "example_ct_dicom.nii.gz").symlink_to(source / "example_seg_dicom.nii.gz")

    assert prepare(source / "example_ct_dicom", tmp_path / "out", "--anatomical-masks", str(masks)) == 0

    case, _ = case_of(tmp_path / "out", "example_ct_dicom")
    abdomen, spine = case.imgs[case.gts == 20], case.imgs[case.gts == 14]
    assert abdomen.size > 1000 and spine.size > 100
    # 20 to 150 HU is 115 to 198 in the soft-tissue window; air or fat under a flipped mask would be far below.
    assert 115 < np.median(abdomen) < 198 and np.median(spine) > np.median(abdomen)
    log = json.loads((tmp_path / "out" / "preparation_log.json").read_text())
    assert log["summary"]["prepared"] == 1


@pytest.mark.parametrize(
    ("scan", "mask", "label", "size"),
    [
        ("nsclc_LUNG1-001/ct.nii.gz", "nsclc_LUNG1-001/seg.nii.gz", 4, (96, 288, 288)),
        ("ibsi_pat1/phantom.nii.gz", "ibsi_pat1/mask.nii.gz", 1, (60, 204, 204)),
    ],
)
def test_a_tumour_lies_where_it_was_drawn(tmp_path, scan, mask, label, size):
    folder = SHARED / "ct_chest"
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "patient.nii.gz").symlink_to(folder / scan)
    image = nib.load(folder / mask)
    tumour = (np.asarray(image.dataobj) == label).astype(np.uint8)
    drawn = tmp_path / "masks" / "lung_nodule" / "patient.nii.gz"
    drawn.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(tumour, image.affine), drawn)
    arguments = ["--lesion-masks", str(tmp_path / "masks"), "--spatial-size", *(str(length) for length in size)]

    assert prepare(tmp_path / "raw", tmp_path / "out", *arguments) == 0

    case = CaseManifest(tmp_path / "out" / "manifest.json").cases("test")[0]
    original = nib.load(case["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(np.asarray(original.dataobj), tumour)
    np.testing.assert_allclose(original.affine, nib.load(folder / scan).affine, atol=1e-4)
    sidecar = json.loads(Path(case["geometry"]).read_text())
    grids = [VolumeGeometry.from_dict(sidecar[key]) for key in ("prepared_geometry", "source_geometry")]
    prepared = np.asarray(nib.load(case["lesion_masks"]["lung_nodule"]).dataobj).T
    restored = restore_mask(np.ascontiguousarray(prepared), *grids)
    dice = 2 * np.sum(restored * tumour.T) / (restored.sum(dtype=int) + tumour.sum(dtype=int))
    assert dice >= 0.9
