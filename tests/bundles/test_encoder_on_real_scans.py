"""Real CTs through preparation and the encoder's inference, and masks back onto the scans' own grids.

Needs the sample data in ../shared/data, skipped where they are not there.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
import SimpleITK as sitk
import torch
from monai.bundle import run

from data_prep.prepare import main as prepare
from tests.bundles.bundle_runs import SHARED_DATA, TINY_NETWORK, config_files
from vlm3d_ext.data.feature_store import FeatureStore
from vlm3d_ext.data.prepared_case import read_prepared_npz
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import restore_mask, write_mask_nifti
from vlm3d_ext.lineage import Lineage
from vlm3d_ext.networks.nets import ThreeDVisionEncoder

CHESTS = SHARED_DATA / "ct_chest"
TOTALSEGMENTATOR = SHARED_DATA / "ct_organs_totalsegmentator"
VOLUME_IDS = ("nsclc", "ibsi_nifti", "ibsi_dicom", "organs_nifti", "organs_dicom")
RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

pytestmark = pytest.mark.skipif(not CHESTS.is_dir(), reason="the sample scans in ../shared/data are not there")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """One folder with all scans, three NIfTI files and two DICOM series."""
    folder = tmp_path_factory.mktemp("raw")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(CHESTS / "ibsi_pat1" / "tutorial_radiomics_chest_ct_data.zip") as archive:
        archive.extractall(unpacked)
    for name, source in {
        "nsclc.nii.gz": CHESTS / "nsclc_LUNG1-001" / "ct.nii.gz",
        "ibsi_nifti.nii.gz": CHESTS / "ibsi_pat1" / "phantom.nii.gz",
        "organs_nifti.nii.gz": TOTALSEGMENTATOR / "example_ct.nii.gz",
    }.items():
        (folder / name).symlink_to(source)
    for name, series in {
        "ibsi_dicom": unpacked / "chest_ct" / "image",
        "organs_dicom": TOTALSEGMENTATOR / "example_ct_dicom",
    }.items():
        (folder / name).mkdir()
        for file in series.iterdir():
            (folder / name / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    arguments = ["--source", str(raw), "--output", str(folder), "--spatial-size", "16", "32", "32"]
    assert prepare([*arguments, "--window", "wide", "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def features(prepared, tmp_path_factory) -> FeatureStore:
    """What inference writes for the prepared scans with a small encoder of random weights."""
    run_dir = tmp_path_factory.mktemp("runs") / "encoder"
    (run_dir / "models").mkdir(parents=True)
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(TINY_NETWORK)
    encoder = ThreeDVisionEncoder(**sizes)
    checkpoint = {"model": encoder.state_dict(), "lineage": Lineage("encoder", "0.1.0", "untrained").state_dict()}
    torch.save(checkpoint, run_dir / "models" / "model.pt")
    run(
        config_file=config_files("encoder/inference"),
        workflow_type="infer",
        **sizes,
        dataset_dir=str(prepared),
        run_dir=str(run_dir),
        num_workers=0,
    )
    return FeatureStore(run_dir / "features")


def sidecar_geometries(prepared: Path, volume_id: str) -> tuple[VolumeGeometry, VolumeGeometry]:
    """Return the prepared grid and the scan's own."""
    sidecar = json.loads((prepared / "volumes" / f"{volume_id}.json").read_text())
    return VolumeGeometry.from_dict(sidecar["prepared_geometry"]), VolumeGeometry.from_dict(sidecar["source_geometry"])


def source_shape_and_affine_ras(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Read a scan's (i, j, k) shape and RAS affine by other means than the package's."""
    if path.is_file():
        image = nib.Nifti1Image.from_filename(path)
        return image.shape, image.affine
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
    series = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(series.GetDirection()).reshape(3, 3) * series.GetSpacing()
    affine[:3, 3] = series.GetOrigin()
    return series.GetSize(), RAS_FROM_LPS @ affine


def dark_voxels_inside(imgs: np.ndarray) -> np.ndarray:
    """Return the aerated lung, near enough: below -400 HU and not connected with the air around the body."""
    parts, _ = scipy.ndimage.label(imgs < 76)
    border = np.zeros(imgs.shape, dtype=bool)
    border[:, [0, -1]] = border[:, :, [0, -1]] = True
    return (parts > 0) & ~np.isin(parts, np.unique(parts[border]))


def off_centre_box(imgs: np.ndarray) -> np.ndarray:
    box = np.zeros(imgs.shape, dtype=bool)
    box[10:12, 11:14, 20:25] = True
    return box


def test_features_of_real_scans_are_finite_and_differ(features):
    found = {volume_id: features.read(volume_id) for volume_id in VOLUME_IDS}
    for volume_id, arrays in found.items():
        assert arrays["global_features"].shape == (24,) and arrays["region_features"].shape == (20, 24), volume_id
        assert np.isfinite(arrays["global_features"]).all() and np.isfinite(arrays["region_features"]).all(), volume_id
        assert np.isnan(arrays["labels"]).all(), "nothing is known of these scans"
    assert np.abs(found["nsclc"]["global_features"] - found["ibsi_nifti"]["global_features"]).max() > 1e-3


def test_dicom_and_nifti_of_one_scan_have_the_same_features(features):
    dicom, nifti = features.read("ibsi_dicom"), features.read("ibsi_nifti")
    for name in ("global_features", "region_features"):
        np.testing.assert_allclose(dicom[name], nifti[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("volume_id", VOLUME_IDS)
@pytest.mark.parametrize("draw", [dark_voxels_inside, off_centre_box])
def test_a_mask_returns_to_the_scans_own_grid(raw, prepared, tmp_path, volume_id, draw):
    imgs = read_prepared_npz(prepared / "volumes" / f"{volume_id}.npz").imgs
    prepared_grid, source_grid = sidecar_geometries(prepared, volume_id)
    mask = draw(imgs)
    assert mask.sum() >= 20

    write_mask_nifti(tmp_path / "mask.nii.gz", restore_mask(mask, prepared_grid, source_grid), source_grid)

    path = raw / f"{volume_id}.nii.gz"
    shape, affine_ras = source_shape_and_affine_ras(path if path.is_file() else raw / volume_id)
    written = nib.Nifti1Image.from_filename(tmp_path / "mask.nii.gz")
    assert written.shape == shape
    np.testing.assert_allclose(written.affine, affine_ras, rtol=0, atol=1e-3)

    # where the drawn voxels lie, as a viewer sees them: indices (i, j, k) of the file times the affine of the source
    indices = np.argwhere(np.asarray(written.dataobj) > 0)
    ras = np.column_stack([indices, np.ones(len(indices))]) @ affine_ras.T
    drawn_ijk = np.linalg.solve(prepared_grid.affine_lps, RAS_FROM_LPS @ ras.T)[:3]  # (3, N), on the prepared grid
    shift_ijk = np.abs(drawn_ijk.mean(axis=1) - np.argwhere(mask).mean(axis=0)[::-1])
    coarser_vox = np.maximum(1, np.divide(source_grid.canonical().spacing_mm, prepared_grid.spacing_mm))[::-1]
    assert (shift_ijk < coarser_vox / 2).all(), f"the centroid moved by {shift_ijk.round(2)} voxels"
    k, j, i = np.rint(drawn_ijk[::-1]).astype(int).clip(0, np.array(mask.shape)[:, None] - 1)
    assert mask[k, j, i].mean() > 0.9
