"""The chunked form of prepared cases, from the command line to the samples of a bundle."""

import json

import numpy as np
import pytest
import torch

from data_prep import case_preparation
from data_prep.preparation_settings import PreparationSettings
from data_prep.prepare import main
from tests.data_prep.tiny_release import GEOMETRY, SIZE, TinyRelease, folder_bytes, write_volume
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.lesion_cases import LesionCases
from vlm3d_ext.data.prepared_case import read_prepared_case, read_sidecar
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.engines.lesion_frequency import lesion_frequency
from vlm3d_ext.engines.localization_case import read_grids, read_truth
from vlm3d_ext.transforms.presets import localization_transforms

CHUNKED = ["--volume-format", "blosc2"]
VOLUME_ID = "train_1_a_1"


def prepare(source, output, *more, workers="0"):
    return main(["--source", str(source), "--output", str(output), *SIZE, "--workers", workers, *more])


@pytest.fixture
def release(tmp_path):
    release = TinyRelease(tmp_path / "raw")
    for number in range(1, 5):
        release.add(f"train_{number}_a_1", positive=("Lung nodule",) if number % 2 else (), seed=number)
    release.add_anatomical_mask(VOLUME_ID)
    nodule = np.zeros(GEOMETRY.shape, dtype=np.uint8)
    nodule[4:8, 6:12, 14:20] = 1
    for number in (1, 3):
        write_volume(release.root / "lesion_masks" / "lung_nodule" / f"train_{number}_a_1.nii.gz", nodule)
    release.write_tables()
    return release


def cases_of(output):
    return {
        case["volume_id"]: case for case in CaseManifest(output / "manifest.json").cases(["training", "validation"])
    }


def test_both_forms_of_a_release_hold_the_same(release, tmp_path):
    assert prepare(release.root, tmp_path / "npz") == 0
    assert prepare(release.root, tmp_path / "chunked", *CHUNKED) == 0

    usual, chunked = cases_of(tmp_path / "npz"), cases_of(tmp_path / "chunked")
    assert list(usual) == list(chunked) and len(usual) == 4
    for volume_id, case in chunked.items():
        assert case["image"].endswith(f"/volumes/{volume_id}.b2nd")
        one, other = read_prepared_case(usual[volume_id]["image"]), read_prepared_case(case["image"])
        for name in ("imgs", "gts", "spacing"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    sidecars = [read_sidecar(tmp_path / name / "volumes" / f"{VOLUME_ID}.json") for name in ("npz", "chunked")]
    differing = {key for key in sidecars[1] if sidecars[0].get(key) != sidecars[1][key]}
    assert differing == {"image", "lesion_masks", "settings_digest"}
    assert sidecars[0]["content_sha256"] == sidecars[1]["content_sha256"]
    assert not list((tmp_path / "chunked").rglob("*.npz"))
    assert len(list((tmp_path / "chunked" / "lesion_masks_original_grid").rglob("*.nii.gz"))) == 2


def test_lesion_masks_are_read_by_all_that_read_them(release, tmp_path):
    for name, more in (("npz", []), ("chunked", CHUNKED)):
        prepare(release.root, tmp_path / name, *more)
    usual, chunked = cases_of(tmp_path / "npz")[VOLUME_ID], cases_of(tmp_path / "chunked")[VOLUME_ID]
    path = chunked["lesion_masks"]["lung_nodule"]
    assert path.endswith(f"lesion_masks/lung_nodule/{VOLUME_ID}.b2nd")
    (one, grid), (other, other_grid) = read_mask(usual["lesion_masks"]["lung_nodule"]), read_mask(path)
    np.testing.assert_array_equal(one, other)
    assert other.dtype == np.uint8 and other.any() and grid.is_close(other_grid, 1e-3)
    truths = [read_truth(case, "lung_nodule", 1, read_grids(case["geometry"])) for case in (usual, chunked)]
    np.testing.assert_array_equal(truths[0].prepared_mask, truths[1].prepared_mask)
    frequencies = [lesion_frequency([case]).frequency for case in (usual, chunked)]
    assert frequencies[0].any()
    np.testing.assert_array_equal(frequencies[0], frequencies[1])


def test_a_bundle_draws_the_same_samples_from_both(release, tmp_path):
    samples = []
    for name, more in (("npz", []), ("chunked", CHUNKED)):
        prepare(release.root, tmp_path / name, *more)
        cases = LesionCases(CaseManifest(tmp_path / name / "manifest.json"), "chest_ct_5").cases("training")
        transforms = localization_transforms("chest_ct_5", (4, 8, 8), (4, 8, 8)).set_random_state(3)
        samples.append([transforms(case) for case in sorted(cases, key=lambda case: case["volume_id"])])
    for one, other in zip(*samples, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
    assert any((sample["target"] == 1).any() for sample in samples[0])


def test_number_of_workers_and_continuing_change_no_byte(release, tmp_path):
    prepare(release.root, tmp_path / "a", *CHUNKED)
    before = folder_bytes(tmp_path / "a")
    assert "volumes/train_1_a_1_regions.b2nd" in before
    prepare(release.root, tmp_path / "b", *CHUNKED, workers="2")
    (tmp_path / "a" / "volumes" / "train_2_a_1.json").unlink()
    (tmp_path / "a" / "volumes" / "train_3_a_1_regions.b2nd").unlink()
    (tmp_path / "a" / "volumes" / ".train_2_a_1.b2nd.x.partial").write_bytes(b"half")
    prepare(release.root, tmp_path / "a", *CHUNKED)

    assert folder_bytes(tmp_path / "b") == before
    assert folder_bytes(tmp_path / "a") == before


@pytest.mark.parametrize("first", [[], CHUNKED])
def test_the_other_form_needs_overwrite(release, tmp_path, capsys, first):
    second = [] if first else CHUNKED
    prepare(release.root, tmp_path / "out", *first)
    before = folder_bytes(tmp_path / "out")

    assert prepare(release.root, tmp_path / "out", *second) == 2
    message = capsys.readouterr().err
    assert "was prepared with other settings" in message and "--overwrite" in message
    assert folder_bytes(tmp_path / "out") == before

    assert prepare(release.root, tmp_path / "out", *second, "--overwrite") == 0
    prepare(release.root, tmp_path / "fresh", *second)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


@pytest.mark.parametrize("function", ["write_chunked_mask", "write_prepared_case"])
@pytest.mark.parametrize("after", [False, True])
def test_broken_off_before_and_after_each_file(release, tmp_path, monkeypatch, function, after):
    class Killed(BaseException):
        pass

    real = getattr(case_preparation, function)
    calls = []

    def broken(*arguments):
        calls.append(arguments)
        if len(calls) == 2 and not after:
            raise Killed
        real(*arguments)
        if len(calls) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(case_preparation, function, broken)
        with pytest.raises(Killed):
            prepare(release.root, tmp_path / "out", *CHUNKED)
    assert prepare(release.root, tmp_path / "out", *CHUNKED) == 0
    prepare(release.root, tmp_path / "whole", *CHUNKED)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_depth_windows_are_chunked_and_removed(release, tmp_path):
    windows = ["--depth-policy", "windows", "--spacing-mm", "4", "6", "6"]
    prepare(release.root, tmp_path / "out", *windows, *CHUNKED)
    assert (tmp_path / "out" / "volumes" / "train_1_a_1_window_1.b2nd").is_file()
    prepare(release.root, tmp_path / "out", "--overwrite")
    prepare(release.root, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_the_usual_form_leaves_no_trace_in_the_settings():
    usual, chunked = PreparationSettings(), PreparationSettings(volume_format="blosc2")
    assert "volume_format" not in usual.to_dict() and chunked.to_dict()["volume_format"] == "blosc2"
    assert {**usual.to_dict(), "volume_format": "blosc2"} == chunked.to_dict() and usual.digest != chunked.digest
    for settings in (usual, chunked):
        assert PreparationSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(ValueError, match=r"--volume-format must be one of \['npz', 'blosc2'\], got 'zarr'"):
        PreparationSettings(volume_format="zarr")
