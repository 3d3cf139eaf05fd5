"""The synthetic data set: CT-RATE's layout, truth that agrees with itself, bytes that follow from the settings."""

import csv
import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.finding_record import CT_RATE_18, DRAWN_LESIONS, FINDING_PREVALENCE, VLM3D_18, present_keys
from data_prep.synthesis_plan import SynthesisSettings, assign_findings, plan_data_set
from data_prep.synthesis_tables import METADATA_COLUMNS, read_rows, table_paths
from data_prep.synthesize import main, synthesize
from data_prep.synthetic_scan import PADDING_HU, render_scan, volume_path

SETTINGS = SynthesisSettings(num_train_patients=5, num_valid_patients=3, seed=3, size=(20, 40, 44))
REAL_METADATA = Path(__file__).parents[2] / "../shared/data/ctrate/validation_metadata.matching.csv"


def _hashes(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _table(root, split, name):
    return read_rows((root / table_paths(split)[name]).read_bytes())


def _volumes(root, release="v2"):
    for split in ("train", "valid"):
        for row in _table(root, split, "metadata"):
            volume_id = row["VolumeName"].removesuffix(".nii.gz")
            yield split, volume_id, row, root / volume_path(release, split, volume_id)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "v2"
    return root, synthesize(root, SETTINGS, progress=False)


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "v1"
    synthesize(root, replace(SETTINGS, release="v1"), progress=False)
    return root


@pytest.fixture(scope="module")
def adverse(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "adverse"
    return root, synthesize(root, replace(SETTINGS, adversity=True), progress=False)["adversity"]


def test_every_file_has_ct_rates_name(data_set):
    root, summary = data_set
    assert {path.name for path in root.iterdir() if not path.name.startswith(".")} == {
        "train_fixed",
        "valid_fixed",
        "metadata",
        "multi_abnormality_labels",
        "multi_abnormality_labels_vlm3d_18",
        "radiology_text_reports",
        "anatomy_segmentation_labels",
        "lesion_masks",
        "findings.json",
        "synthesis_settings.json",
    }
    for relative in (
        "metadata/validation_metadata.csv",
        "metadata/no_chest_valid.txt",
        "multi_abnormality_labels/valid_predicted_labels.csv",
        "multi_abnormality_labels_vlm3d_18/valid_labels.csv",
        "radiology_text_reports/validation_reports.csv",
        "train_fixed/train_1/train_1_a/train_1_a_1.nii.gz",
        "anatomy_segmentation_labels/ts_seg/ts_total/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz",
    ):
        assert (root / relative).is_file(), relative
    assert summary["patients"] == 8
    assert summary["volumes"] == len(list(_volumes(root)))


def test_table_columns_are_ct_rates(data_set):
    root, _ = data_set
    assert list(_table(root, "train", "labels")[0]) == ["VolumeName", *CT_RATE_18]
    assert list(_table(root, "train", "vlm3d_labels")[0]) == ["VolumeName", *VLM3D_18]
    assert len(METADATA_COLUMNS) == 44
    assert list(_table(root, "valid", "metadata")[0]) == list(METADATA_COLUMNS)
    for split in ("train", "valid"):
        names = [[row["VolumeName"] for row in _table(root, split, t)] for t in ("labels", "metadata", "reports")]
        assert names[0] == names[1] == names[2] and len(set(names[0])) == len(names[0])


@pytest.mark.skipif(not REAL_METADATA.is_file(), reason="needs CT-RATE's metadata in ../shared/data")
def test_metadata_columns_are_those_of_the_real_file():
    with REAL_METADATA.open(newline="", encoding="utf-8-sig") as file:
        assert next(csv.reader(file)) == list(METADATA_COLUMNS)


def test_v2_holds_hu_in_lps_with_a_true_header(data_set):
    for _, volume_id, row, path in _volumes(data_set[0]):
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        assert voxels.dtype == np.int16, volume_id
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        x, y = json.loads(row["XYSpacing"])
        np.testing.assert_allclose(image.header.get_zooms(), (x, y, float(row["ZSpacing"])), rtol=1e-5)
        assert image.shape == tuple(int(row[c]) for c in ("Columns", "Rows", "NumberofSlices"))
        position = image.affine[:3, 3] * [-1, -1, 1]  # the header says RAS, the table LPS
        np.testing.assert_allclose(json.loads(row["ImagePositionPatient"]), position, atol=1e-3)
        seen = voxels[voxels > PADDING_HU]
        assert -1100 < np.percentile(seen, 5) < -900 and seen.max() > 300
        assert (voxels.min() == PADDING_HU) == (row["RescaleIntercept"] == "-8192")


def test_v1_is_the_same_picture_behind_a_blank_header(data_set, v1):
    intercepts = set()
    for (_, volume_id, row, blank), (*_, fixed) in zip(_volumes(v1, "v1"), _volumes(data_set[0]), strict=True):
        image = nib.load(blank)
        assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 0, volume_id
        assert image.header.get_zooms() == (1.0, 1.0, 1.0)
        stored = np.asanyarray(image.dataobj)
        assert stored.min() >= 0
        intercept = int(row["RescaleIntercept"])
        intercepts.add(intercept)
        hu = stored.astype(int) * int(row["RescaleSlope"]) + intercept
        np.testing.assert_array_equal(hu, np.asanyarray(nib.load(fixed).dataobj))
    assert intercepts == {-1024, -8192}, "choose a seed that shows both"


def test_masks_lie_on_the_grid_of_their_volume(data_set):
    root, _ = data_set
    for split, volume_id, _, path in _volumes(root):
        image = nib.load(path)
        anatomy = root / "anatomy_segmentation_labels/ts_seg/ts_total" / volume_path("v2", split, volume_id)
        masks = [anatomy, *root.glob(f"lesion_masks/*/{volume_id}.nii.gz")]
        for mask_path in masks:
            mask = nib.load(mask_path)
            assert mask.get_data_dtype() == np.uint8 and mask.shape == image.shape
            np.testing.assert_array_equal(mask.affine, image.affine)
        classes = np.unique(np.asanyarray(nib.load(anatomy).dataobj))
        assert {5, 10, 11, 12, 14, 51, 52, 116} <= set(classes.tolist()) and classes.max() <= 117


def test_labels_masks_and_findings_agree(data_set):
    root, _ = data_set
    truth = json.loads((root / "findings.json").read_text())
    for split in ("train", "valid"):
        rows = zip(_table(root, split, "labels"), _table(root, split, "vlm3d_labels"), strict=True)
        for labels, others in rows:
            volume_id = labels["VolumeName"].removesuffix(".nii.gz")
            keys = {finding["key"] for finding in truth[volume_id.rpartition("_")[0]]["findings"]}
            masks = {
                path.parent.name: np.asanyarray(nib.load(path).dataobj)
                for path in root.glob(f"lesion_masks/*/{volume_id}.nii.gz")
            }
            assert all(set(np.unique(mask)) == {0, 1} for mask in masks.values())
            for name in ("Pericardial effusion", "Pleural effusion", "Consolidation", "Lung nodule"):
                assert (labels[name] == "1") == (name.lower().replace(" ", "_") in masks), (volume_id, name)
                assert labels[name] == others[name]
            assert (others["Ground-glass opacity"] == "1") == ("ground_glass_opacity" in masks)
            assert (labels["Hiatal hernia"] == "1") == ("hiatal_hernia" in keys)
            assert (others["Fracture"] == "1") == ("fracture" in keys)


def test_a_lesion_without_a_voxel_on_every_grid_is_no_finding():
    # Voxels of 40 x 30 x 30 mm cannot show all that was planned.
    plans = plan_data_set(SynthesisSettings(num_train_patients=25, num_valid_patients=0, seed=9, size=(8, 12, 12)))
    num_lost = 0
    for plan in plans:
        phantom, samples = render_scan(plan)
        shown = present_keys(phantom.findings)
        num_lost += len(set(plan.finding_keys) - shown)
        for sample in samples:
            assert set(sample.lesion_masks) == shown & set(DRAWN_LESIONS), plan.scan_id
            for finding in phantom.findings:
                if "lobes" in finding.geometry:
                    counts = [sample.part_voxels[finding.key, n] for n in range(len(finding.geometry["lobes"]))]
                    assert min(counts) > 0
    assert num_lost > 0


def test_reconstructions_share_findings_and_differ_in_picture(data_set):
    root, _ = data_set
    truth = json.loads((root / "findings.json").read_text())
    several = [scan for scan in truth.values() if len(scan["volumes"]) == 2]
    assert several, "choose a seed that has a second reconstruction"
    for scan in several:
        rows = [r for r in _table(root, scan["split"], "reports") if r["VolumeName"][:-7] in scan["volumes"]]
        assert rows[0]["Findings_EN"] == rows[1]["Findings_EN"]
        metadata = [r for r in _table(root, scan["split"], "metadata") if r["VolumeName"][:-7] in scan["volumes"]]
        assert metadata[0]["ConvolutionKernel"] != metadata[1]["ConvolutionKernel"]
        assert metadata[0]["ZSpacing"] != metadata[1]["ZSpacing"]


def test_bytes_depend_on_neither_workers_nor_interruption(data_set, tmp_path):
    root, _ = data_set
    synthesize(tmp_path / "two", SETTINGS, num_workers=2, progress=False)
    assert _hashes(tmp_path / "two") == _hashes(root)
    # As a killed run leaves it: some scans whole, one begun, no tables.
    for relative in (".scan_records/train_2_a.json", "train_fixed/train_3/train_3_a/train_3_a_1.nii.gz"):
        (tmp_path / "two" / relative).unlink()
    (tmp_path / "two/findings.json").unlink()
    (tmp_path / "two/train_fixed/.train_3_a_1.nii.gz.x1.partial").write_bytes(b"half")
    summary = synthesize(tmp_path / "two", SETTINGS, progress=False)
    assert summary["scans_made_now"] == 2
    assert _hashes(tmp_path / "two") == _hashes(root)


def test_a_second_run_makes_nothing_anew(data_set):
    root, first = data_set
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.nii.gz")}
    summary = synthesize(root, SETTINGS, progress=False)
    assert summary["scans_made_now"] == 0 and summary["ct_rate_18"] == first["ct_rate_18"]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.nii.gz")} == before


def test_other_settings_are_refused_or_replace_everything(tmp_path, capsys):
    small = SynthesisSettings(num_valid_patients=0, size=(8, 24, 24))
    arguments = ["--output", str(tmp_path / "data"), "--num-valid-patients", "0", "--size", "8", "24", "24"]
    assert main([*arguments, "--num-train-patients", "2", "--workers", "1", "--adversity"]) == 0
    assert main([*arguments, "--num-train-patients", "1", "--workers", "1"]) == 2
    assert "num_train_patients is 2, not 1" in capsys.readouterr().err
    assert main([*arguments, "--num-train-patients", "1", "--workers", "1", "--overwrite"]) == 0
    assert [p.name for p in (tmp_path / "data/train_fixed").iterdir()] == ["train_1"]
    synthesize(tmp_path / "fresh", replace(small, num_train_patients=1), progress=False)
    assert _hashes(tmp_path / "fresh") == _hashes(tmp_path / "data")


def test_foreign_files_are_never_touched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["--output", str(tmp_path), "--overwrite", "--workers", "1"]) == 2
    assert "holds files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_patients": 0, "num_valid_patients": 0},
        {"num_train_patients": -1},
        {"release": "v3"},
        {"size": (4, 64, 64)},
        {"field_of_view_mm": (320, 50, 360)},
        {"minimum_prevalence": 0.9},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=r"got"):
        SynthesisSettings(**changes)


@pytest.mark.parametrize("num_scans", [7, 16, 40, 100])
def test_every_label_has_its_share_of_positives(num_scans):
    dealt = assign_findings(num_scans, 0, 0.18)
    count = Counter(key for keys in dealt for key in keys)
    for key in ("pneumothorax", "mass", "fracture"):
        assert count[key] / num_scans >= 0.12
    for key in ("hiatal_hernia", "bronchiectasis", "pleural_effusion"):
        assert count[key] == int(np.ceil(0.18 * num_scans - 1e-9))
    assert count["lung_nodule"] == int(np.ceil(0.448 * num_scans))
    edema_or_ground_glass = sum(bool({"pulmonary_edema", "pneumonia", "ground_glass_opacity"} & set(k)) for k in dealt)
    assert edema_or_ground_glass / num_scans >= 0.33
    if num_scans >= 16:
        assert () in dealt


def test_prevalence_follows_ct_rate_where_nothing_is_raised():
    dealt = assign_findings(1000, 0, 0.0)
    for key in ("lung_nodule", "pericardial_effusion", "emphysema"):
        assert sum(key in keys for keys in dealt) == round(1000 * FINDING_PREVALENCE[key])


def test_patients_have_several_scans_and_volume_ids_follow_the_rule():
    plans = plan_data_set(SynthesisSettings(num_train_patients=60, num_valid_patients=20))
    assert {plan.scan_id[-1] for plan in plans} == {"a", "b"}
    both = [plan for plan in plans if plan.scan_id.endswith("_b")]
    first = {plan.scan_id: plan for plan in plans}
    for plan in both:
        assert first[plan.patient_id + "_a"].patient_seed == plan.patient_seed
    assert len({plan.patient_seed for plan in plans}) == 80
    assert {len(plan.volumes) for plan in plans} == {1, 2}
    for plan in plans:
        assert [v.volume_id for v in plan.volumes] == [f"{plan.scan_id}_{n + 1}" for n in range(len(plan.volumes))]


def test_adversity_has_the_quirks_it_names(adverse, data_set):
    root, quirks = adverse
    folder = root / "train_fixed"
    names = {name: [row["VolumeName"] for row in _table(root, "train", name)] for name in ("labels", "metadata")}
    assert quirks == json.loads((root / "adversity.json").read_text())
    assert not (folder / "train_9001").exists() and "train_9001_a_1.nii.gz" in names["metadata"]
    unlisted = folder / "train_9002/train_9002_a/train_9002_a_1.nii.gz"
    assert unlisted.is_file() and not any("train_9002" in name for name in (*names["labels"], *names["metadata"]))
    zeros = np.asanyarray(nib.load(folder / "train_9003/train_9003_a/train_9003_a_1.nii.gz").dataobj)
    assert not zeros.any()
    assert "train_9004_a_1" in (root / "metadata/no_chest_train.txt").read_text()
    with pytest.raises((EOFError, OSError)):
        np.asanyarray(nib.load(folder / "train_9005/train_9005_a/train_9005_a_1.nii.gz").dataobj)
    assert any(row["ZSpacing"] == "" for row in _table(root, "train", "metadata"))
    assert {name.endswith(".nii.gz") for name in names["labels"]} == {True, False}
    rows = _table(root, "train", "metadata")
    assert rows[0] == rows[1]
    # Good volumes stay as they were.
    good = {name: digest for name, digest in _hashes(data_set[0]).items() if name.endswith("nii.gz")}
    assert good.items() <= _hashes(root).items()


def test_adversity_is_the_same_after_a_second_run(adverse):
    root, quirks = adverse
    before = _hashes(root)
    assert synthesize(root, replace(SETTINGS, adversity=True), progress=False)["adversity"] == quirks
    assert _hashes(root) == before
