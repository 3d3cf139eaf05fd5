from dataclasses import replace
from pathlib import Path

from data_prep.case_preparation import CaseOutcome
from data_prep.manifest import build_log, build_manifest, label_remarks
from data_prep.raw_case import RawCase, RawDataset


def case_of(volume_id, split, *labels):
    patient = "_".join(volume_id.split("_")[:2])
    return RawCase(volume_id, f"{patient}_a", patient, split, Path("x"), f"{volume_id}.nii.gz", labels=labels)


def sidecar_of(volume_id, content="0"):
    return {
        "volume_id": volume_id,
        "has_anatomical_mask": False,
        "lesion_masks": {},
        "lesion_masks_original_grid": {},
        "lesion_masks_partial": [],
        "lesion_masks_source": {},
        "content_sha256": content,
    }


CASES = [
    case_of("train_3_a_1", "training", 0, None),
    case_of("train_1_a_1", "training", 1, None),
    case_of("train_2_a_1", "training", 0, 0),
    case_of("train_4_a_1", "training", 0, 1),
    case_of("valid_1_a_1", "test", 1, 1),
    case_of("valid_2_a_1", "test", 1, 1),
]
SIDECARS = {case.volume_id: [sidecar_of(case.volume_id)] for case in CASES[:-1]}


def manifest_of(cases=CASES, sidecars=SIDECARS, **changes):
    content = {
        "name": "set",
        "label_set": "two",
        "label_names": ["A", "B"],
        "settings": {"x": 1},
        "source_root": "../raw",
        **changes,
    }
    return build_manifest(cases=cases, sidecars=sidecars, **content)


def test_counts_and_weights():
    manifest = manifest_of()

    assert manifest["class_counts"]["training"] == {
        "A": {"positive": 1, "negative": 3, "unknown": 0},
        "B": {"positive": 1, "negative": 1, "unknown": 2},
    }
    # The unprepared valid_2_a_1 counts nowhere, and the test cases not in the weights.
    assert manifest["class_counts"]["test"]["A"] == {"positive": 1, "negative": 0, "unknown": 0}
    assert manifest["positive_weights"] == {"A": 3.0, "B": 1.0}
    assert [case["volume_id"] for case in manifest["training"]] == [f"train_{number}_a_1" for number in range(1, 5)]


def test_masks_that_cannot_be_right_are_left_out():
    masks = {"lung_nodule": "n.nii.gz", "consolidation": "c.nii.gz"}
    keys = ("lesion_masks", "lesion_masks_original_grid", "lesion_masks_source")
    sidecar = {**sidecar_of("train_1_a_1"), **dict.fromkeys(keys, masks), "lesion_masks_partial": list(masks)}
    sidecars = {"train_1_a_1": [sidecar]}

    (whole,) = manifest_of(sidecars=sidecars)["training"]
    (left,) = manifest_of(sidecars=sidecars, not_annotated={"train_1_a_1": ["lung_nodule"]})["training"]

    assert [whole[key] for key in keys] == [masks] * 3 and whole["lesion_masks_partial"] == list(masks)
    assert [left[key] for key in keys] == [{"consolidation": "c.nii.gz"}] * 3
    assert left["lesion_masks_partial"] == ["consolidation"]


def test_masks_without_a_voxel_are_named_and_those_left_out_are_not():
    masks = {"lung_nodule": "n.nii.gz", "consolidation": "c.nii.gz", "pleural_effusion": "p.nii.gz"}
    sidecar = {**sidecar_of("train_1_a_1"), "lesion_masks": masks}
    in_scan = dict(zip(masks, (0, 7, 9), strict=True))
    here = {"lung_nodule": 0, "consolidation": 7, "pleural_effusion": 0}

    def empty(left_out=(), **voxels):
        sidecars = {"train_1_a_1": [{**sidecar, **voxels}]}
        return manifest_of(sidecars=sidecars, not_annotated={"train_1_a_1": left_out})["training"][0][
            "lesion_masks_empty"
        ]

    # The effusion lies outside this volume; earlier versions did not count there.
    assert empty(lesion_voxels=here, lesion_voxels_in_scan=in_scan) == ["lung_nodule", "pleural_effusion"]
    assert empty(lesion_voxels_in_scan=in_scan) == ["lung_nodule"]
    assert empty(["lung_nodule"], lesion_voxels=here) == ["pleural_effusion"]


def test_a_label_without_positives_has_no_weight():
    assert manifest_of(cases=CASES[:1])["positive_weights"] == {"A": None, "B": None}


def test_fingerprint_follows_the_data_and_nothing_else():
    fingerprint = manifest_of()["fingerprint"]

    assert manifest_of(cases=CASES[::-1], source_root="/elsewhere")["fingerprint"] == fingerprint
    other_label = [replace(CASES[0], labels=(1, None)), *CASES[1:]]
    other_split = [replace(CASES[0], split="validation"), *CASES[1:]]
    other_voxels = {**SIDECARS, "train_1_a_1": [sidecar_of("train_1_a_1", "1")]}
    changed = {
        manifest_of(cases=other_label)["fingerprint"],
        manifest_of(cases=other_split)["fingerprint"],
        manifest_of(sidecars=other_voxels)["fingerprint"],
        manifest_of(settings={"x": 2})["fingerprint"],
    }
    assert len(changed | {fingerprint}) == 5


def test_log_counts_and_order():
    dataset = RawDataset(Path("x"), "ct_rate", "v2", (), ("train_9_a_1",), ("train_8_a_1", "train_8_a_2"), (), 3)
    outcomes = [CaseOutcome("b", "refused", "because"), CaseOutcome("a", "prepared", notes=("n",))]

    log = build_log(settings={}, dataset=dataset, outcomes=outcomes, remarks=["r"])

    assert log["summary"] == {
        "prepared": 1,
        "excluded": 0,
        "refused": 1,
        "rows_without_file": 1,
        "files_without_row": 2,
        "ignored_files": 3,
    }
    assert log["cases"] == [
        {"volume_id": "a", "status": "prepared", "reason": "", "notes": ["n"]},
        {"volume_id": "b", "status": "refused", "reason": "because", "notes": []},
    ]


def test_labels_without_use_are_named_where_any_is_known():
    def counts(positive, negative, unknown):
        return {"positive": positive, "negative": negative, "unknown": unknown}

    training = {"a": counts(0, 0, 3), "b": counts(1, 1, 1), "c": counts(0, 3, 0)}
    validation = {"a": counts(0, 0, 2), "b": counts(1, 0, 1), "c": counts(0, 2, 0)}
    assert label_remarks({"training": training, "validation": validation}) == [
        "labels unknown in every training case, which cannot be trained: a",
        "labels without a positive in validation, whose metrics will be undefined: a, c",
    ]
    nothing = {label: counts(0, 0, 2) for label in "abc"}
    empty = {label: counts(0, 0, 0) for label in "abc"}
    assert label_remarks({"training": nothing, "validation": empty}) == []
