"""The localizer learns two real lung tumours by heart, and draws them where they are in the scans' own grids.

Needs the sample data in ../shared/data, skipped where they are not there.
"""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import run

from data_prep.prepare import main as prepare
from tests.bundles.bundle_runs import SHARED_DATA, TINY_NETWORK, config_files
from vlm3d_ext.networks.nets import ThreeDVisionEncoder

CHESTS = SHARED_DATA / "ct_chest"
SCANS = {"nsclc": CHESTS / "nsclc_LUNG1-001" / "ct.nii.gz", "ibsi": CHESTS / "ibsi_pat1" / "phantom.nii.gz"}
GTV_LABEL = 4  # of LUNG1-001's segmentation, see its ATTRIBUTION.md
NETWORK = {
    **TINY_NETWORK,
    "in_channels": 2,
    "patch_size": [4, 8, 8],
    "text_hidden_size": 16,
    "denoising_layers": 1,
    "denoising_mlp_dim": 32,
    "stem_channels": 16,
    "stem_stride": [1, 2, 2],
    "base_channels": 16,
    "level_strides": [[2, 2, 2], [2, 2, 2], [2, 2, 2]],
}

pytestmark = pytest.mark.skipif(not CHESTS.is_dir(), reason="the sample scans in ../shared/data are not there")


def read_mask(path: Path) -> np.ndarray:
    """Return a NIfTI file's values as stored."""
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """The two scans, and their tumours as nodule masks in both forms."""
    folder = tmp_path_factory.mktemp("raw")
    for name, scan in SCANS.items():
        (folder / f"{name}.nii.gz").symlink_to(scan)
    masks = folder / "lesion_masks"
    (masks / "lung_nodule").mkdir(parents=True)
    segmentation = nib.load(CHESTS / "nsclc_LUNG1-001" / "seg.nii.gz")
    tumour = (np.asarray(segmentation.dataobj) == GTV_LABEL).astype(np.uint8)
    nib.save(nib.Nifti1Image(tumour, segmentation.affine), masks / "nsclc_lung_nodule_mask.nii.gz")
    other = nib.load(CHESTS / "ibsi_pat1" / "mask.nii.gz")
    tumour = (np.asarray(other.dataobj) > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(tumour, other.affine), masks / "lung_nodule" / "ibsi.nii.gz")
    return folder


@pytest.fixture(scope="module")
def localization_run(raw, disease_text_model, tmp_path_factory) -> Path:
    """Run folder of a localizer that has seen the two scans often."""
    folder = tmp_path_factory.mktemp("tumours")
    arguments = ["--source", str(raw), "--output", str(folder / "prepared"), "--split", "training"]
    assert prepare([*arguments, "--spatial-size", "48", "128", "128", "--window", "lung", "soft_tissue"]) == 0
    torch.manual_seed(0)
    sizes = {name: NETWORK[name] for name in ("in_channels", *TINY_NETWORK)}
    (folder / "encoder" / "models").mkdir(parents=True)
    torch.save({"model": ThreeDVisionEncoder(**sizes).state_dict()}, folder / "encoder" / "models" / "model.pt")
    options = {
        **NETWORK,
        "dataset_dir": str(folder / "prepared"),
        "run_dir": str(folder / "localization"),
        "text_model": str(disease_text_model),
        # learnt by heart on purpose: there is nothing to validate on but the same two scans
        "validate::dataset::data": "$@lesion_cases.cases('training')",
        "allow_lineage_mismatch": True,
        "crop_size": [16, 48, 48],
        "num_crops": 4,
        "samples_per_disease": 20,
        "batch_size": 2,
        "global_batch_size": 2,
        "epochs": 12,
        "validation_interval": 12,
        "warmup_epochs": 1,
        "learning_rate": 5e-3,
        "num_workers": 0,
    }
    run(config_file=config_files("localization/train"), **options)
    run(config_file=config_files("localization/train", "localization/evaluate"), **options, split="training")
    inference = {name: options[name] for name in (*NETWORK, "dataset_dir", "run_dir", "num_workers")}
    further = {"split": "training", "montages": True, "workflow_type": "infer"}
    run(config_file=config_files("localization/inference"), **inference, **further)
    return folder / "localization"


def test_each_tumour_is_learnt_and_lies_where_it_is_in_the_scan(localization_run, raw):
    with open(localization_run / "eval" / "cases.csv", newline="", encoding="utf-8") as file:
        measured = {row["volume_id"]: float(row["dice"]) for row in csv.DictReader(file) if row["dice"]}
    for name, scan in SCANS.items():
        drawn = nib.load(localization_run / "predictions" / "masks" / "lung_nodule" / f"{name}.nii.gz")
        flat = raw / "lesion_masks" / f"{name}_lung_nodule_mask.nii.gz"
        truth = read_mask(flat if flat.exists() else raw / "lesion_masks" / "lung_nodule" / f"{name}.nii.gz") > 0
        np.testing.assert_allclose(drawn.affine, nib.load(scan).affine, atol=1e-3)
        mask = np.asarray(drawn.dataobj) > 0
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert dice >= 0.8
        assert measured[name] == pytest.approx(dice, abs=1e-6)
        assert (localization_run / "predictions" / "montages" / f"{name}.png").stat().st_size > 10_000
