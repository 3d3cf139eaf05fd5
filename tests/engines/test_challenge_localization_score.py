import json

import nibabel as nib
import numpy as np
import pytest

from vlm3d_ext.data.challenge_localization import boxes_of_mask, volume_box_mm, write_challenge_localization
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.engines.challenge_localization_score import main
from vlm3d_ext.text.disease_set import load_disease_set

KEYS = load_disease_set().keys
SHAPE_IJK = (24, 20, 10)
AFFINE_RAS = np.array([[-0.75, 0, 0, 60], [0, 0.75, 0, -90], [0, 0, 2.5, 300], [0, 0, 0, 1]])
# volume -> disease -> blocks ((i0, i1), (j0, j1), (k0, k1)); an empty list is an empty mask
TRUTH = {
    "a": {"lung_nodule": [((2, 6), (2, 6), (1, 4)), ((15, 20), (10, 14), (5, 8))], "consolidation": []},
    "b": {"lung_nodule": [], "consolidation": [((0, 10), (0, 10), (0, 5))]},
    "c": {"lung_nodule": [((10, 14), (10, 14), (2, 5))]},
}


def write_masks(folder, truth):
    for volume_id, of_volume in truth.items():
        for disease, blocks in of_volume.items():
            mask = np.zeros(SHAPE_IJK, dtype=np.uint8)
            for block in blocks:
                mask[tuple(slice(*ends) for ends in block)] = 1
            path = folder / disease / f"{volume_id}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(mask, AFFINE_RAS), path)


def boxes_from_masks(folder, change=lambda volume_id, key, entries: entries):
    """What a perfect system would submit, changed by `change`."""
    lesions, corners = {}, {}
    for path in sorted(folder.glob("*/*.nii.gz")):
        volume_id = path.name[:-7]
        mask, geometry = read_mask(path)
        found = lesions.setdefault(volume_id, {key: [] for key in KEYS})
        found[path.parent.name] = change(volume_id, path.parent.name, boxes_of_mask(mask, geometry))
        corners[volume_id] = volume_box_mm(geometry)[:3]
    return lesions, corners


def prepare(tmp_path, change=lambda volume_id, key, entries: entries):
    write_masks(tmp_path / "masks", TRUTH)
    write_challenge_localization(tmp_path / "p.json", *boxes_from_masks(tmp_path / "masks", change))


def run(tmp_path, *more, truth=("--masks", "masks")):
    command = [
        "--predictions",
        tmp_path / "p.json",
        truth[0],
        tmp_path / truth[1],
        "--output",
        tmp_path / "scores.json",
    ]
    return main([*map(str, command), *map(str, more)])


def scores_of(tmp_path, *more, **keywords):
    assert run(tmp_path, *more, **keywords) == 0
    return json.loads((tmp_path / "scores.json").read_text())


def test_the_truth_itself_scores_perfectly(tmp_path, capsys):
    prepare(tmp_path)
    scores = scores_of(tmp_path)
    nodule = scores["per_disease"]["lung_nodule"]
    assert (nodule["num_scans"], nodule["num_lesions"], nodule["num_boxes"], nodule["num_matched"]) == (3, 3, 3, 3)
    assert nodule["mean_iou"] == pytest.approx(1) and nodule["centroid_distance_mm"] == pytest.approx(0, abs=1e-9)
    assert nodule["sensitivity"] == {"0.5": 1.0, "1": 1.0, "2": 1.0, "4": 1.0}
    assert scores["per_disease"]["consolidation"]["num_scans"] == 2  # nothing is known of c
    effusion = scores["per_disease"]["pleural_effusion"]
    assert effusion["num_scans"] == 0 and effusion["mean_iou"] is None
    assert set(effusion["sensitivity"].values()) == {None}
    assert scores["macro"]["mean_iou"] == pytest.approx(1) and scores["macro"]["sensitivity"]["0.5"] == 1.0
    assert scores["challenge"]["iou"]["macro"] == pytest.approx(1)
    assert scores["challenge"]["froc"] == {"0.5": 1.0, "1": 1.0, "2": 1.0, "4": 1.0}
    assert scores["remarks"] == []
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    (row,) = [line for line in printed.splitlines() if line.startswith("lung_nodule")]
    assert row.split() == ["lung_nodule", "3", "3", "3", "3", "1.000", "0.0", "1.000", "1.000", "1.000", "1.000"]


def test_hand_computed_figures(tmp_path):
    def change(volume_id, key, entries):
        if key != "lung_nodule":
            return []
        if volume_id == "a":  # the first nodule is missed, the second's box moved by half its width along x
            (moved,) = [entry for entry in entries if entry["num_voxels"] == 60]
            x, *rest = moved["bbox_mm"]
            return [{"bbox_mm": [x + 2.5 * 0.75, *rest], "probability": 0.6}]
        if volume_id == "b":
            return [{"bbox_mm": [-55, 80, 310, 5, 5, 5], "probability": 0.8}]
        return [{**entry, "probability": 0.4} for entry in entries]

    prepare(tmp_path, change)
    scores = scores_of(tmp_path)
    nodule = scores["per_disease"]["lung_nodule"]
    assert (nodule["num_lesions"], nodule["num_boxes"], nodule["num_matched"]) == (3, 3, 2)
    assert nodule["mean_iou"] == pytest.approx((1 / 3 + 1) / 2)
    assert nodule["centroid_distance_mm"] == pytest.approx(2.5 * 0.75 / 2)
    # 0.8 is false: 1/3 a scan; 0.6 and 0.4 find a lesion each.
    assert nodule["sensitivity"]["0.5"] == pytest.approx(2 / 3)
    consolidation = scores["per_disease"]["consolidation"]
    assert consolidation["sensitivity"]["4"] == 0.0 and consolidation["mean_iou"] is None
    assert scores["macro"]["sensitivity"]["0.5"] == pytest.approx(1 / 3)
    assert scores["challenge"]["iou"]["macro"] == pytest.approx(1 / 3)  # its mean of 2/3 and 0
    assert scores["challenge"]["distance"]["macro"] == pytest.approx((2.5 * 0.75 / 2 + 768) / 2)
    assert scores["challenge"]["froc"]["0.5"] == pytest.approx(2 / 4)


def test_baselines_that_look_at_nothing(tmp_path, capsys):
    prepare(tmp_path)
    scores = scores_of(tmp_path)
    nothing = scores["baselines"]["no boxes"]["per_disease"]
    assert nothing["lung_nodule"]["sensitivity"]["4"] == 0.0 and nothing["lung_nodule"]["mean_iou"] is None
    whole = scores["baselines"]["whole volume as one box"]["per_disease"]
    assert whole["lung_nodule"]["num_boxes"] == 3 and whole["lung_nodule"]["num_matched"] == 0
    # Consolidation fills 500 of 4800 voxels, 0.104 of the volume: one box a scan finds it, at half a false positive.
    assert whole["consolidation"]["mean_iou"] == pytest.approx(500 / 4800)
    assert whole["consolidation"]["sensitivity"]["0.5"] == 1.0
    assert "  whole volume as one box" in capsys.readouterr().out


def test_lesion_free_scans_count_when_listed(tmp_path):
    def change(volume_id, key, entries):
        return [*entries, {"bbox_mm": [-55, 80, 310, 5, 5, 5], "probability": 0.9}] if volume_id == "c" else entries

    write_masks(tmp_path / "masks", TRUTH)
    lesions, corners = boxes_from_masks(tmp_path / "masks", change)
    lesions["d"], corners["d"] = {**lesions["c"], "lung_nodule": []}, corners["c"]
    lesions["d"]["pleural_effusion"] = [{"bbox_mm": [-55, 80, 310, 5, 5, 5], "probability": 0.9}]
    write_challenge_localization(tmp_path / "p.json", lesions, corners)
    unlisted = scores_of(tmp_path)
    assert unlisted["predicted_without_truth"] == ["d"] and unlisted["num_volumes"] == 3
    assert unlisted["remarks"] == ["1 volume(s) predicted, but without a truth: left out: d"]
    (tmp_path / "scans.txt").write_text("a\nc.nii.gz\nd\ne\n")
    listed = scores_of(tmp_path, "--scans", tmp_path / "scans.txt")
    assert listed["num_volumes"] == 4 and listed["scored_without_prediction"] == ["e"]
    assert {row["num_scans"] for row in listed["per_disease"].values()} == {4}
    assert listed["per_disease"]["pleural_effusion"]["num_boxes"] == 1
    assert listed["per_disease"]["consolidation"]["num_lesions"] == 0  # b is not on the list
    assert listed["remarks"] == [
        "1 volume(s) with a truth, but not in the list of scans: left out: b",
        "1 volume(s) to score, but not predicted: counted as without boxes: e",
        "1 volume(s) predicted, but without a truth: left out: b",
    ]


def test_masks_and_a_file_of_their_boxes_give_the_same(tmp_path):
    write_masks(tmp_path / "masks", TRUTH)
    write_challenge_localization(tmp_path / "truth.json", *boxes_from_masks(tmp_path / "masks"))
    generator = np.random.default_rng(0)

    def change(volume_id, key, entries):
        moved = [np.add(entry["bbox_mm"], [*generator.normal(size=3), 0, 0, 0]).tolist() for entry in entries]
        return [{"bbox_mm": bbox, "probability": float(generator.random())} for bbox in moved]

    write_challenge_localization(tmp_path / "p.json", *boxes_from_masks(tmp_path / "masks", change))
    (tmp_path / "scans.txt").write_text("a\nb\nc\n")
    with_masks = scores_of(tmp_path, "--scans", tmp_path / "scans.txt")
    with_boxes = scores_of(tmp_path, truth=("--truth", "truth.json"))
    assert 0 < with_masks["per_disease"]["lung_nodule"]["mean_iou"] < 1
    for key in KEYS:
        from_masks, from_boxes = (scores["per_disease"][key] for scores in (with_masks, with_boxes))
        assert from_masks.pop("sensitivity") == from_boxes.pop("sensitivity")
        assert from_masks == pytest.approx(from_boxes)
    assert with_boxes["baselines"]["whole volume as one box"] is None
    assert with_boxes["remarks"] == [
        "no baseline 'whole volume as one box' with --truth: the file does not tell how large a volume is"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other volumes", "none of its 3 volumes (such as x_a) is among the 3 to score (such as a)"),
        ("no masks", "no such folder"),
        ("not JSON", "is not JSON"),
        ("empty list", "has no volume id"),
    ],
)
def test_what_cannot_be_scored_ends_with_2_and_one_line(tmp_path, capsys, change, message):
    prepare(tmp_path)
    more = []
    if change == "other volumes":
        text = (tmp_path / "p.json").read_text()
        (tmp_path / "p.json").write_text(text.replace('"input_image_name": "', '"input_image_name": "x_'))
    elif change == "no masks":
        (tmp_path / "masks").rename(tmp_path / "elsewhere")
    elif change == "not JSON":
        (tmp_path / "p.json").write_text("{")
    else:
        (tmp_path / "scans.txt").write_text("\n")
        more = ["--scans", tmp_path / "scans.txt"]
    assert run(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "scores.json").exists()


def test_one_truth_is_needed(tmp_path, capsys):
    for truth in ([], ["--masks", "m", "--truth", "t"]):
        with pytest.raises(SystemExit):
            main(["--predictions", str(tmp_path / "p.json"), *truth])
    assert "not allowed with argument" in capsys.readouterr().err
