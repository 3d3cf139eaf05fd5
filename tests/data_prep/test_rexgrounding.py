import json

import pytest

from data_prep.lesion_masks import DRAWN_DISEASES
from data_prep.raw_case import LayoutError, RawCase
from data_prep.rexgrounding import CATEGORY_DISEASES, disease_of_finding, read_rexgrounding


@pytest.mark.parametrize(
    ("text", "category", "disease"),
    [
        ("5 mm nodule in the right upper lobe", "2d", "lung_nodule"),
        ("Several subcentimeter nonspecific pulmonary nodules", "2d", "lung_nodule"),
        ("Mass in the left hilum", "2d", None),
        ("Nodular pleural thickening", "2e", None),
        ("Bilateral pleural effusion", "2e", "pleural_effusion"),
        ("Effusion on the left side, 3 cm deep", "2e", "pleural_effusion"),
        ("Pericardial effusion of 8 mm", "8f", "pericardial_effusion"),
        ("Pleural and pericardial effusion", "2e", None),
        ("Consolidation with air bronchogram", "2b", "consolidation"),
        ("Passive atelectasis of the lower lobe", "2b", None),
        ("Consolidation adjacent to a pleural effusion", "2b", None),
        ("Ground-glass density in both lower lobes", "2c", "ground_glass_opacity"),
        ("Frosted glass areas", "2c", "ground_glass_opacity"),
        ("Patchy peripheral density increases", "2c", "ground_glass_opacity"),
        ("Ground glass opacities around a nodule", "2c", None),
        ("Ground glass nodule", "2d", None),
        ("Centrilobular micronodules", "1e", None),
        ("Emphysema", "1c", None),
        # Without a category the text alone decides.
        ("Calcified nodule", None, "lung_nodule"),
        ("Consolidation and ground-glass opacities", None, None),
        ("Emphysema", None, None),
    ],
)
def test_disease_of_a_finding(text, category, disease):
    assert disease_of_finding(text, category) == disease


def test_every_disease_has_a_category():
    assert sorted(CATEGORY_DISEASES.values()) == sorted(DRAWN_DISEASES)


def write_release(folder, name="dataset.json", **splits):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(splits))
    return folder


def entry(volume_id, *findings):
    return {
        "name": f"{volume_id}.nii.gz",
        "findings": {str(n): text for n, (text, _) in enumerate(findings)},
        "categories": {str(n): category for n, (_, category) in enumerate(findings)},
    }


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_channels_partial_marks_and_remarks(tmp_path):
    nodule, mixed, emphysema = ("A nodule", "2d"), ("A nodule in a consolidation", "2b"), ("Emphysema", "1c")
    folder = write_release(
        tmp_path / "rex",
        train=[entry("train_1_a_1", emphysema, nodule, nodule), entry("train_9_a_1", nodule)],
        val=[entry("train_2_a_1", nodule, mixed), entry("train_3_a_1", nodule, emphysema)],
    )
    for number in (1, 2, 3):
        touch(folder / "segmentations" / f"train_{number}_a_1.nii.gz")
        touch(folder / "images" / f"train_{number}_a_1.nii.gz")

    index = read_rexgrounding(folder).index

    masks = {volume: of_volume.get("lung_nodule", ()) for volume, of_volume in index.by_volume.items()}
    (training,), (mixed_mask,), (exhaustive,) = (masks[f"train_{number}_a_1"] for number in (1, 2, 3))
    assert training.path == folder / "segmentations" / "train_1_a_1.nii.gz"
    assert training.findings == (1, 2) and training.num_findings == 3 and training.partial
    assert exhaustive.findings == (0,) and exhaustive.num_findings == 2 and not exhaustive.partial
    assert mixed_mask.partial, "the finding that could not be used may show another nodule"
    assert masks["train_9_a_1"] == ()
    assert list(index.remarks) == [
        "ReXGroundingCT: 4 findings used as masks, 3 not, by category: 2 of 1c, 1 of 2b",
        "ReXGroundingCT: 1 volume(s) of its train and val lists have no mask file here",
    ]


def test_patients_of_validation_and_test_are_left_out_of_training(tmp_path):
    write_release(tmp_path, train=[entry("train_1_a_1")], val=[entry("train_2_a_1")])
    # A later list holds one more patient out, who was for training before.
    write_release(tmp_path, "MICCAI_challenge_dataset.json", val=[entry("train_1_b_1")], test=[entry("train_30_a_2")])
    release = read_rexgrounding(tmp_path)

    def exclusion(volume_id, split, patient_id=None):
        patient_id = patient_id or "_".join(volume_id.split("_")[:2])
        case = RawCase(volume_id, volume_id, patient_id, split, tmp_path / volume_id, volume_id)
        return release.exclude_held_out(case).exclusion

    assert release.held_out == {"train_1": "val", "train_2": "val", "train_30": "test"}
    assert "val split" in exclusion("train_2_b_1", "training")
    assert "test split" in exclusion("train_30_a_1", "validation")
    assert "val split" in exclusion("train_1_a_1", "training")
    assert exclusion("train_3_a_1", "training") is None, "train_30 is somebody else"
    assert exclusion("train_2_a_1", "test") is None
    assert "val split" in exclusion("train_2_a_1", "training", patient_id="some_folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset.json: not JSON"),
        ("[]", "expected an object with the lists"),
        ('{"data": []}', "expected an object with the lists"),
        ('{"train": [{"findings": {}}]}', "train entry 0 has no 'name'"),
        ('{"val": [{"name": "x.nii.gz", "findings": {"1": "A nodule"}}]}', r"x.nii.gz has the findings \['1'\]"),
        ('{"val": [{"name": "x.nii.gz"}]}', "x.nii.gz has the findings None"),
    ],
)
def test_tables_of_another_form_are_refused(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)

    with pytest.raises(LayoutError, match=message) as error:
        read_rexgrounding(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
