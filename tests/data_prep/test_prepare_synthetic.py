"""The synthetic CT-RATE, with the quirks of the real one, through the real preparation, in both releases."""

import json

import numpy as np
import pytest

from data_prep.prepare import main as prepare
from data_prep.synthesize import main as synthesize
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.prepared_case import read_prepared_npz


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Prepared folder by release."""
    folder = tmp_path_factory.mktemp("synthetic")
    for release in ("v1", "v2"):
        raw = folder / f"raw_{release}"
        size = ["--num-train-patients", "3", "--num-valid-patients", "1", "--size", "24", "48", "48", "--workers", "1"]
        assert not synthesize(["--output", str(raw), "--release", release, "--adversity", *size])
        arguments = ["--source", str(raw), "--output", str(folder / release), "--spatial-size", "16", "32", "32"]
        assert prepare([*arguments, "--workers", "0"]) == 3  # adversity holds volumes that nothing can save
    return {release: folder / release for release in ("v1", "v2")}


def cases_of(output):
    log = json.loads((output / "preparation_log.json").read_text())
    return log, {case["volume_id"]: case for case in log["cases"]}


def test_every_quirk_is_dealt_with(outputs):
    log, cases = cases_of(outputs["v2"])

    assert log["rows_without_file"] == ["train_9001_a_1"]
    assert log["files_without_row"] == ["train_9002_a_1"] and cases["train_9002_a_1"]["status"] == "prepared"
    assert cases["train_9003_a_1"]["status"] == "refused" and "every voxel is 0" in cases["train_9003_a_1"]["reason"]
    assert cases["train_9004_a_1"]["status"] == "excluded"
    assert cases["train_9005_a_1"]["status"] == "refused" and "truncated" in cases["train_9005_a_1"]["reason"]
    assert any("repeated" in note for note in cases["train_1_a_1"]["notes"])
    assert cases["train_2_a_1"]["status"] == "prepared"
    _, cases = cases_of(outputs["v1"])
    assert cases["train_2_a_1"]["status"] == "refused" and "ZSpacing" in cases["train_2_a_1"]["reason"]


def test_both_releases_hold_the_same_voxels(outputs):
    first = CaseManifest(outputs["v1"] / "manifest.json").cases(["training", "validation", "test"])
    second = {
        case["volume_id"]: case
        for case in CaseManifest(outputs["v2"] / "manifest.json").cases(["training", "validation", "test"])
    }

    assert len(first) >= 3
    for case in first:
        other = second[case["volume_id"]]
        here, there = read_prepared_npz(case["image"]), read_prepared_npz(other["image"])
        np.testing.assert_array_equal(here.imgs, there.imgs)
        np.testing.assert_array_equal(here.gts, there.gts)
        assert set(case["lesion_masks"]) == set(other["lesion_masks"]) and case["labels"] == other["labels"]


def test_regions_labels_and_reports_arrive(outputs):
    cases = CaseManifest(outputs["v2"] / "manifest.json").cases(["training", "validation", "test"])

    with_mask = [case for case in cases if case["has_anatomical_mask"]]
    assert with_mask
    for case in with_mask:
        regions = set(np.unique(read_prepared_npz(case["image"]).gts)) - {0}
        assert {1, 2, 3, 4, 5, 7, 14, 19, 20} <= regions
    labelled = [case for case in cases if not np.isnan(case["labels"]).any()]
    assert len(labelled) >= len(cases) - 1 and all(case["report"]["findings"] for case in labelled)
