"""Lesion masks of every source from the raw data to the manifest."""

import json

import nibabel as nib
import numpy as np
import pytest

from data_prep.prepare import main
from tests.data_prep.tiny_release import GEOMETRY, SIZE, TinyRelease, chest_hu, folder_bytes, write_volume
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.lesion_cases import LesionCases
from vlm3d_ext.data.prepared_case import read_sidecar
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import resample_binary_mask
from vlm3d_ext.text.disease_set import load_disease_set

DISEASES = load_disease_set()

WINDOWS = ["--depth-policy", "windows", "--spacing-mm", "4", "6", "6"]


def prepare(source, output, *more):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", "0", *more])


def log_of(output):
    log = json.loads((output / "preparation_log.json").read_text())
    return log, {case["volume_id"]: case for case in log["cases"]}


def cases_of(output):
    splits = [split for split in ("training", "validation", "test") if json.loads(_manifest(output).read_text())[split]]
    return {case["volume_id"]: case for case in CaseManifest(_manifest(output)).cases(splits)}


def _manifest(output):
    return output / "manifest.json"


def voxels(path):
    """(D, H, W) of a NIfTI file, and its affine."""
    image = nib.load(path)
    return np.asarray(image.dataobj).T, image.affine


def block(value=1, start=3, geometry=GEOMETRY):
    labels = np.zeros(geometry.shape, dtype=np.uint8)
    labels[start : start + 4, 6:12, 14:20] = value
    return labels


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    release.add("train_1_a_1", positive=("Lung nodule", "Pleural effusion"), seed=1)
    release.add("train_2_a_1", positive=("Lung opacity",), seed=2)
    release.add("train_3_a_1", seed=3)
    release.add("valid_1_a_1", positive=("Lung nodule",), seed=4)
    release.write_tables()
    return release


def own_mask(release, volume_id, labels, disease="lung_nodule", geometry=GEOMETRY):
    return write_volume(release.root / "lesion_masks" / disease / f"{volume_id}.nii.gz", labels, geometry)


def pseudo_mask(release, volume_id, folder, labels):
    relative = release.path_of(volume_id).relative_to(release.root)
    return write_volume(release.root / "anatomy_segmentation_labels" / "ts_seg" / folder / relative, labels)


def test_masks_on_both_grids_are_in_the_manifest(release, tmp_path):
    labels = block(3)
    own_mask(release, "train_1_a_1", labels)

    assert prepare(release.root, tmp_path / "out") == 0

    case = cases_of(tmp_path / "out")["train_1_a_1"]
    original, affine = voxels(case["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(original, labels > 0)
    np.testing.assert_allclose(affine, GEOMETRY.affine_ras, atol=1e-5)
    assert original.dtype == np.uint8
    prepared, _ = voxels(case["lesion_masks"]["lung_nodule"])
    target = VolumeGeometry.from_dict(read_sidecar(case["geometry"])["prepared_geometry"])
    np.testing.assert_array_equal(prepared, resample_binary_mask(block(), GEOMETRY, target))
    assert case["lesion_masks_partial"] == []
    assert cases_of(tmp_path / "out")["train_3_a_1"]["lesion_masks_original_grid"] == {}


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR"])
@pytest.mark.parametrize("slice_mm", [5.0, 10.0])
def test_the_original_grid_is_the_files_own(tmp_path, axes, slice_mm):
    canonical = VolumeGeometry.from_spacing(GEOMETRY.shape, (slice_mm, 4.0, 4.0), (-46.0, -38.0, 100.0))
    image = nib.Nifti1Image(chest_hu(1).T, canonical.affine_ras)
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    turned = image.as_reoriented(turn)
    stored = VolumeGeometry.from_ras(turned.shape[::-1], turned.affine)
    assert stored.axis_codes == axes
    source = stored.from_canonical(block(2, geometry=canonical))
    write_volume(tmp_path / "raw" / "ct.nii.gz", stored.from_canonical(chest_hu(1)), stored)
    write_volume(tmp_path / "raw" / "lesion_masks" / "lung_nodule" / "ct.nii.gz", source, stored)

    assert prepare(tmp_path / "raw", tmp_path / "out") == 0

    original, affine = voxels(cases_of(tmp_path / "out")["ct"]["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(original, source > 0)
    np.testing.assert_allclose(affine, stored.affine_ras, atol=1e-5)


def test_the_original_grid_of_a_v1_scan_is_that_of_its_sidecar(tmp_path):
    release = TinyRelease(tmp_path / "raw", "v1")
    release.add("train_1_a_1", positive=("Lung nodule",))
    own_mask(release, "train_1_a_1", block())
    release.write_tables()

    assert prepare(release.root, tmp_path / "out") == 0

    case = cases_of(tmp_path / "out")["train_1_a_1"]
    stored = VolumeGeometry.from_dict(read_sidecar(case["geometry"])["source_geometry"])
    original, affine = voxels(case["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(original, block())
    np.testing.assert_allclose(affine, stored.affine_ras, atol=1e-5)
    np.testing.assert_allclose(stored.spacing_mm, GEOMETRY.spacing_mm)


def test_windows_share_the_scans_mask_and_leave_nothing_when_refused(release, tmp_path):
    mask = own_mask(release, "train_1_a_1", block())
    assert prepare(release.root, tmp_path / "out", *WINDOWS) == 0

    windows = [case for case in cases_of(tmp_path / "out").values() if case["scan_id"] == "train_1_a"]
    assert len(windows) == 3
    for case in windows:
        np.testing.assert_array_equal(voxels(case["lesion_masks_original_grid"]["lung_nodule"])[0], block())
    assert len({case["lesion_masks_original_grid"]["lung_nodule"] for case in windows}) == 3
    for case in windows:
        has_lesion = voxels(case["lesion_masks"]["lung_nodule"])[0].any()
        assert case["lesion_masks_empty"] == ([] if has_lesion else ["lung_nodule"])

    # Killed after the last window's mask and before its volume; then the mask turns out to be bad.
    (tmp_path / "out" / "volumes" / "train_1_a_1_window_2.npz").unlink()
    (tmp_path / "out" / "volumes" / "train_1_a_1_window_2.json").unlink()
    write_volume(mask, block() * np.float32(0.5))
    assert prepare(release.root, tmp_path / "out", *WINDOWS) == 3
    assert not [path for path in folder_bytes(tmp_path / "out") if "train_1_a_1" in path]


def test_a_refused_case_loses_its_masks_on_both_grids(release, tmp_path):
    mask = own_mask(release, "train_1_a_1", block())
    prepare(release.root, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    assert "lesion_masks_original_grid/lung_nodule/train_1_a_1.nii.gz" in before
    mask.write_bytes(mask.read_bytes()[:-50])

    assert prepare(release.root, tmp_path / "out") == 3
    assert not [path for path in folder_bytes(tmp_path / "out") if "train_1_a_1" in path]

    write_volume(mask, block())
    assert prepare(release.root, tmp_path / "out") == 0
    assert folder_bytes(tmp_path / "out") == before


def test_pseudo_masks_of_ct_rate(release, tmp_path):
    effusions = block(2)
    effusions[8:10, 4:6, 3:9] = 3
    effusions[0] = 1
    pseudo_mask(release, "train_1_a_1", "ts_pleural_pericard_effusion", effusions)
    nodules = block(2, start=5)
    nodules[1] = 1
    pseudo_mask(release, "valid_1_a_1", "ts_lung_nodules", nodules)

    assert prepare(release.root, tmp_path / "out") == 0

    cases = cases_of(tmp_path / "out")
    original = cases["train_1_a_1"]["lesion_masks_original_grid"]
    assert list(original) == list(cases["train_1_a_1"]["lesion_masks"]) == ["pericardial_effusion", "pleural_effusion"]
    np.testing.assert_array_equal(voxels(original["pleural_effusion"])[0], effusions == 2)
    np.testing.assert_array_equal(voxels(original["pericardial_effusion"])[0], effusions == 3)
    original = cases["valid_1_a_1"]["lesion_masks_original_grid"]
    assert list(original) == ["lung_nodule"]
    np.testing.assert_array_equal(voxels(original["lung_nodule"])[0], nodules == 2)
    assert cases["valid_1_a_1"]["lesion_masks_source"]["lung_nodule"].endswith(
        "ts_seg/ts_lung_nodules/valid_fixed/valid_1/valid_1_a/valid_1_a_1.nii.gz"
    )


def test_own_masks_win_over_pseudo_masks(release, tmp_path):
    own_mask(release, "train_1_a_1", block())
    pseudo_mask(release, "train_1_a_1", "ts_lung_nodules", block(2, start=6))

    assert prepare(release.root, tmp_path / "both") == 0
    assert prepare(release.root, tmp_path / "own", "--lesion-mask-sources", "folder") == 0
    assert prepare(release.root, tmp_path / "pseudo", "--lesion-mask-sources", "totalsegmentator") == 0

    masks = {
        name: voxels(cases_of(tmp_path / name)["train_1_a_1"]["lesion_masks_original_grid"]["lung_nodule"])[0]
        for name in ("both", "own", "pseudo")
    }
    np.testing.assert_array_equal(masks["both"], block())
    np.testing.assert_array_equal(masks["own"], block())
    np.testing.assert_array_equal(masks["pseudo"], block(start=6))
    log, cases = log_of(tmp_path / "both")
    assert cases["train_1_a_1"]["notes"] == ["lung_nodule: mask of totalsegmentator not used, folder has one"]
    assert "lesion masks: 1 mask(s) of totalsegmentator not used, because folder has them too" in log["remarks"]
    assert log_of(tmp_path / "own")[1]["train_1_a_1"]["notes"] == []


def test_another_choice_of_sources_makes_only_the_cases_it_touches_again(release, tmp_path):
    own_mask(release, "train_1_a_1", block())
    pseudo_mask(release, "train_1_a_1", "ts_lung_nodules", block(2, start=6))
    prepare(release.root, tmp_path / "out")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "volumes").iterdir()}

    assert prepare(release.root, tmp_path / "out", "--lesion-mask-sources", "totalsegmentator") == 0

    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "volumes").iterdir()}
    assert {name for name in written if written[name] != again[name]} == {"train_1_a_1.npz", "train_1_a_1.json"}
    original = cases_of(tmp_path / "out")["train_1_a_1"]["lesion_masks_original_grid"]["lung_nodule"]
    np.testing.assert_array_equal(voxels(original)[0], block(start=6))


def test_a_pseudo_mask_with_an_unknown_class_refuses_its_case(release, tmp_path):
    pseudo_mask(release, "train_1_a_1", "ts_lung_nodules", block(7))

    assert prepare(release.root, tmp_path / "out") == 3

    _, cases = log_of(tmp_path / "out")
    assert "train_1_a_1.nii.gz: holds label(s) [7], expected 0 or {1: 'lung'" in cases["train_1_a_1"]["reason"]
    assert cases["train_2_a_1"]["status"] == "prepared"


def write_rexgrounding(folder, geometry=GEOMETRY):
    """A release with one training and two validation volumes, and one patient of the test split."""
    folder.mkdir()
    masks = {
        "train_1_a_1": [block(2), block(1, start=8), block(1, start=6)],
        "valid_1_a_1": [block(5, start=4)],
        "train_2_a_1": [block()],
    }
    for volume_id, channels in masks.items():
        path = folder / "segmentations" / f"{volume_id}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.stack([geometry.from_canonical(c).T for c in channels]), np.eye(4)), path)
    training = {
        "name": "train_1_a_1.nii.gz",
        "findings": {"0": "Two nodules in the left lung", "1": "Paraseptal emphysema", "2": "Nodule in the lingula"},
        "categories": {"0": "2d", "1": "1c", "2": "2d"},
        "entity_counts": {"0": 2, "1": 1, "2": 1},
    }
    finding = {"findings": {"0": "Consolidation in the right lower lobe"}, "categories": {"0": "2b"}}
    table = {
        "train": [training],
        "val": [{"name": "valid_1_a_1.nii.gz", **finding}, {"name": "train_2_a_1.nii.gz", **finding}],
        "test": [{"name": "train_3_b_2.nii.gz", "findings": {"0": "A nodule"}}],
    }
    (folder / "dataset.json").write_text(json.dumps(table))
    return folder


def test_rexgroundingct(release, tmp_path):
    folder = write_rexgrounding(tmp_path / "rex")
    pseudo_mask(release, "train_1_a_1", "ts_lung_nodules", block(2, start=1))

    assert prepare(release.root, tmp_path / "out", "--rexgrounding", str(folder)) == 0

    log, logged = log_of(tmp_path / "out")
    cases = cases_of(tmp_path / "out")
    assert set(cases) == {"train_1_a_1", "valid_1_a_1"}
    for volume_id, split in (("train_2_a_1", "val"), ("train_3_a_1", "test")):
        assert logged[volume_id]["status"] == "excluded"
        assert logged[volume_id]["reason"] == (
            f"its patient is in ReXGroundingCT's {split} split, which is not to be trained on"
        )
    nodules = cases["train_1_a_1"]
    assert list(nodules["lesion_masks"]) == nodules["lesion_masks_partial"] == ["lung_nodule"]
    original, affine = voxels(nodules["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(original, (block() + block(start=6)) > 0)
    np.testing.assert_allclose(affine, GEOMETRY.affine_ras, atol=1e-5)
    exhaustive = cases["valid_1_a_1"]
    assert list(exhaustive["lesion_masks"]) == ["consolidation"] and exhaustive["lesion_masks_partial"] == []
    np.testing.assert_array_equal(voxels(exhaustive["lesion_masks_original_grid"]["consolidation"])[0], block(start=4))
    assert logged["train_1_a_1"]["notes"] == ["lung_nodule: mask of totalsegmentator not used, rexgroundingct has one"]
    assert "ReXGroundingCT: 4 findings used as masks, 1 not, by category: 1 of 1c" in log["remarks"]
    assert log["settings"]["rexgrounding"] == "../rex"


def test_a_changed_choice_of_findings_makes_the_case_again(release, tmp_path):
    folder = write_rexgrounding(tmp_path / "rex")
    prepare(release.root, tmp_path / "out", "--rexgrounding", str(folder))
    table = json.loads((folder / "dataset.json").read_text())
    table["train"][0]["categories"]["2"] = "2h"
    (folder / "dataset.json").write_text(json.dumps(table))

    assert prepare(release.root, tmp_path / "out", "--rexgrounding", str(folder)) == 0

    original = cases_of(tmp_path / "out")["train_1_a_1"]["lesion_masks_original_grid"]["lung_nodule"]
    np.testing.assert_array_equal(voxels(original)[0], block())


def test_a_mask_on_another_grid_is_refused_unless_resampling_is_asked_for(release, tmp_path):
    affine = GEOMETRY.affine_lps.copy()
    affine[:3, 2] /= 2
    affine[2, 3] -= 1.25
    own_mask(release, "train_1_a_1", np.repeat(block(9), 2, axis=0), geometry=VolumeGeometry((24, 20, 24), affine))

    assert prepare(release.root, tmp_path / "out") == 3
    reason = log_of(tmp_path / "out")[1]["train_1_a_1"]["reason"]
    assert "[24, 20, 24]" in reason and "[12, 20, 24]" in reason and "--resample-lesion-masks" in reason
    assert reason.count("affine (LPS) [[") == 2 and "\n" not in reason

    assert prepare(release.root, tmp_path / "out", "--resample-lesion-masks") == 0
    case = cases_of(tmp_path / "out")["train_1_a_1"]
    original, affine = voxels(case["lesion_masks_original_grid"]["lung_nodule"])
    np.testing.assert_array_equal(original, block())
    np.testing.assert_allclose(affine, GEOMETRY.affine_ras, atol=1e-5)
    (note,) = log_of(tmp_path / "out")[1]["train_1_a_1"]["notes"]
    assert note.startswith("lung_nodule: mask resampled onto the scan")
    # What was resampled does not stay when resampling is no longer allowed.
    assert prepare(release.root, tmp_path / "out") == 3
    assert "train_1_a_1" not in cases_of(tmp_path / "out")


def test_masks_that_contradict_their_label(release, tmp_path):
    own_mask(release, "train_1_a_1", block(0))  # positive
    own_mask(release, "train_2_a_1", block())  # negative
    own_mask(release, "train_2_a_1", block(0), "ground_glass_opacity")  # Lung opacity is positive: unknown
    own_mask(release, "train_3_a_1", block(), "ground_glass_opacity")  # Lung opacity is negative: negative
    own_mask(release, "train_3_a_1", block(0), "pleural_effusion")  # negative, empty: they agree

    assert prepare(release.root, tmp_path / "out") == 0

    cases = cases_of(tmp_path / "out")
    empty = cases["train_1_a_1"]
    for key in ("lesion_masks", "lesion_masks_original_grid", "lesion_masks_source"):
        assert empty[key] == {}, key
    assert list(cases["train_2_a_1"]["lesion_masks"]) == ["ground_glass_opacity", "lung_nodule"]
    assert list(cases["train_3_a_1"]["lesion_masks"]) == ["pleural_effusion", "ground_glass_opacity"]
    empty = {volume_id: case["lesion_masks_empty"] for volume_id, case in cases.items()}
    assert empty == {
        "train_1_a_1": [],
        "train_2_a_1": ["ground_glass_opacity"],
        "train_3_a_1": ["pleural_effusion"],
        "valid_1_a_1": [],
    }
    order = ("pleural_effusion", "ground_glass_opacity", "lung_nodule")
    localized = {
        case["volume_id"]: tuple(case["disease_labels"][DISEASES.index(key)] for key in order)
        for case in LesionCases(_manifest(tmp_path / "out")).cases(["training", "validation"])
    }
    assert localized == {
        "train_1_a_1": (1, 0, 1),  # annotated nowhere, so the labels say it
        "train_2_a_1": (0, 0, 1),  # somebody looked for ground glass and drew none
        "train_3_a_1": (0, 1, 0),
    }
    log, logged = log_of(tmp_path / "out")
    assert logged["train_1_a_1"]["notes"] == [
        "lung_nodule: its label is positive, but its mask is empty: counts as not annotated"
    ]
    assert logged["train_2_a_1"]["notes"] == [
        "lung_nodule: its label is negative, but its mask is not empty: the mask is kept"
    ]
    assert [remark for remark in log["remarks"] if "volume(s) where" in remark] == [
        "ground_glass_opacity: 1 volume(s) where its label is negative, but its mask is not empty: the mask is kept "
        "(train_3_a_1)",
        "lung_nodule: 1 volume(s) where its label is negative, but its mask is not empty: the mask is kept "
        "(train_2_a_1)",
        "lung_nodule: 1 volume(s) where its label is positive, but its mask is empty: counts as not annotated "
        "(train_1_a_1)",
    ]


def test_a_corrected_label_brings_the_empty_mask_back_without_preparing_again(release, tmp_path):
    own_mask(release, "train_1_a_1", block(0))
    prepare(release.root, tmp_path / "out")
    volume = tmp_path / "out" / "volumes" / "train_1_a_1.npz"
    written = volume.stat().st_mtime_ns
    release.labels["train"][0][1:] = ["0"] * (len(release.label_columns) - 1)
    release.write_tables()

    assert prepare(release.root, tmp_path / "out") == 0

    case = cases_of(tmp_path / "out")["train_1_a_1"]
    assert not voxels(case["lesion_masks"]["lung_nodule"])[0].any()
    assert volume.stat().st_mtime_ns == written


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_of_scans_takes_lesion_masks(tmp_path, flat):
    write_volume(tmp_path / "raw" / "first" / "ct.nii.gz", chest_hu(1))
    write_volume(tmp_path / "raw" / "second" / "ct.nii.gz", chest_hu(2))
    # Flat masks may lie among the scans; they are no scans.
    masks = tmp_path / "raw" / "first" if flat else tmp_path / "masks"
    name = "first_ct_consolidation_mask.nii.gz" if flat else "consolidation/first_ct.nii.gz"
    write_volume(masks / name, block(4))

    assert (
        prepare(tmp_path / "raw", tmp_path / "out", "--lesion-masks", str(tmp_path / ("raw" if flat else "masks"))) == 0
    )

    cases = cases_of(tmp_path / "out")
    assert set(cases) == {"first_ct", "second_ct"}
    np.testing.assert_array_equal(voxels(cases["first_ct"]["lesion_masks_original_grid"]["consolidation"])[0], block())
    assert cases["second_ct"]["lesion_masks"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rexgrounding", "NOWHERE"], "no such folder"),
        (["--rexgrounding", "."], "holds none of ['dataset.json'"),
        (["--lesion-masks", ".", "--lesion-mask-sources", "totalsegmentator"], "no effect"),
        (["--lesion-mask-sources", "totalsegmentator"], "--lesion-mask-sources totalsegmentator: there are none"),
        (["--lesion-mask-sources", "rexgroundingct"], "--lesion-mask-sources rexgroundingct: there are none"),
    ],
)
def test_sources_that_are_not_there(release, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)

    assert prepare(release.root, tmp_path / "out", *arguments) == 2

    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
