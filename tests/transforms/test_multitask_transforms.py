"""Everything a case has, for joint training: prompts beside images, crops, masks of scans of several sizes."""

import numpy as np
import pytest
import torch

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.evidence_store import EvidenceStore
from vlm3d_ext.data.joint_cases import JointCases
from vlm3d_ext.data.labelled_cases import LabelledCases
from vlm3d_ext.data.lesion_cases import UNKNOWN, LesionCases
from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.text.lesion_locations import LesionLocation
from vlm3d_ext.transforms import LoadPreparedCased, WritePromptd, multitask_transforms
from vlm3d_ext.transforms.load_evidence import LoadEvidenced

# case 1 is smaller than the crop in two directions, case 2 is larger, the others are of 8 x 16 x 16 voxels
SIZES = {1: (2, 16, 6), 2: (8, 20, 18)}
CROP = {"crop_size": (4, 8, 8), "patch_size": (2, 4, 4), "num_crops": 3}
EFFUSION = LesionLocation("pleural_effusion", "Pleural effusion", "left", ("pleura",), (), None, "small", 80.0, 1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    manifest = CaseManifest(make_prepared_release(folder, (5, 1, 1), with_lesions=True, sizes=SIZES))
    return JointCases(LabelledCases(manifest, "ct_rate_18"), LesionCases(manifest)).sampled("training")


@pytest.fixture(scope="module")
def store(cases, tmp_path_factory):
    store = EvidenceStore(tmp_path_factory.mktemp("evidence"), {"fingerprint": "f"})
    for number, case in enumerate(cases):
        features = {"global_features": np.zeros(4), "region_features": np.zeros((2, 4))}
        findings = {
            "Pleural effusion": {"probability": 0.9 - number / 10, "threshold": 0.3, "prediction": 1},
            "Emphysema": {"probability": 0.1, "threshold": 0.3, "prediction": 0},
        }
        lesions = [EFFUSION.to_json()] if number % 2 == 0 else []
        store.write(case["volume_id"], {**features, "local_features": np.zeros((1, 2, 2, 4))}, findings, lesions)
    return store


def chain(store, prompts=None, **options):
    return multitask_transforms("chest_ct_5", prompts or WritePromptd(store), **options)


def test_the_prompt_is_added_and_the_rest_is_left(cases, store):
    sample = LoadPreparedCased()(cases[0])
    written = WritePromptd(store)(sample)
    assert set(written) == set(sample) | {"prompt", "num_lesions_left_out"}
    assert all(written[name] is value for name, value in sample.items() if name != "report")
    assert written["report"] == "Findings: Pleural effusion is observed on the right. Heart size is normal."
    assert "Pleural effusion (0.90)" in written["prompt"] and "Emphysema" not in written["prompt"]
    assert "[FINDING] Pleural effusion detected on the left, small" in written["prompt"]
    assert written["num_lesions_left_out"] == 0
    assert written["prompt"] == LoadEvidenced(store)(cases[0])["prompt"]
    assert "prompt" not in sample


def test_lesions_are_left_out_of_a_prompt_that_is_too_long_and_another_s_evidence_can_be_taken(cases, store):
    sample = LoadPreparedCased()(cases[0])
    words = len(WritePromptd(store)(sample)["prompt"].split())
    shorter = WritePromptd(store, max_prompt_tokens=words - 1)(sample)
    assert shorter["num_lesions_left_out"] == 1 and "[FINDING]" not in shorter["prompt"]
    other = WritePromptd(store)({**sample, "evidence_of": cases[3]["volume_id"]})
    assert "Pleural effusion (0.60)" in other["prompt"] and other["report"] == shorter["report"]


def test_a_case_without_a_report_has_an_empty_one(cases, store):
    assert cases[4]["report"] is None  # every fifth
    assert WritePromptd(store)(LoadPreparedCased()(cases[4]))["report"] == ""


def test_whole_scans_have_all_that_they_need_and_nothing_is_drawn(cases, store):
    validation = SeededDataset(cases, chain(store))
    sample = validation[EpochIndex(0, 2)]
    loaded = LoadPreparedCased()(cases[2])
    for name in ("image", "anatomical_mask", "spacing_mm"):
        assert torch.equal(sample[name], loaded[name])
    assert sample["target"].shape == (5, 8, 16, 16) and sample["target"].dtype == torch.uint8
    assert (sample["target"][1] == 1).sum() == 2 * 16 * 16  # the base of the chest, case 3 being odd
    assert torch.equal(sample["labels"].isnan(), torch.tensor(cases[2]["labels"]).isnan())
    assert "crop_start" not in sample and sample["prompt"] == validation[EpochIndex(5, 2)]["prompt"]


def test_a_scan_smaller_than_the_crop_is_filled_up_and_its_mask_with_it(cases, store):
    sample = SeededDataset(cases, chain(store, **CROP))[EpochIndex(0, 0)]
    loaded = LoadPreparedCased()(cases[0])
    assert loaded["image"].shape == (1, 2, 16, 6) and sample["valid_size"].tolist() == [2, 16, 6]
    assert sample["image"].shape == (1, 4, 16, 8) and sample["anatomical_mask"].shape == (4, 16, 8)
    assert torch.equal(sample["image"][:, :2, :, :6], loaded["image"])
    assert torch.equal(sample["anatomical_mask"][:2, :, :6], loaded["anatomical_mask"])
    assert loaded["anatomical_mask"].any()
    outside = torch.ones(4, 16, 8, dtype=torch.bool)
    outside[:2, :, :6] = False
    assert not sample["image"][:, outside].any() and not sample["anatomical_mask"][outside].any()
    assert sample["target"].shape == (3, 5, 4, 8, 8)
    assert (sample["target"][:, :, 2:] == UNKNOWN).all() and (sample["target"][..., 6:] == UNKNOWN).all()
    assert (sample["target"][:, 1, :2, :, :6] == 1).all()  # two slices of effusion are all there is


def test_every_crop_that_is_to_show_the_rarest_lesion_does(cases, store):
    data = SeededDataset(cases, chain(store, **CROP))
    assert cases[2]["crop_disease"] is not None
    disease = ["pericardial_effusion", "pleural_effusion"].index(cases[2]["crop_disease"])
    for epoch in range(4):
        target = data[EpochIndex(epoch, 2)]["target"]
        assert all((target[crop, disease] == 1).any() for crop in (0, 2))


def test_scans_of_several_sizes_go_into_one_batch(cases, store):
    data = SeededDataset(cases, chain(store, **CROP))
    samples = [data[EpochIndex(0, index)] for index in (0, 1, 3)]
    batch = collate_padded(samples)
    assert batch["image"].shape == (3, 1, 8, 20, 20) and batch["anatomical_mask"].shape == (3, 8, 20, 20)
    assert batch["valid_size"].tolist() == [[2, 16, 6], [8, 20, 18], [8, 16, 16]]
    assert batch["target"].shape == (3, 3, 5, 4, 8, 8) and batch["crop_start"].shape == (3, 3, 3)
    assert batch["has_anatomical_mask"].tolist() == [True, True, False]
    for row, sample in enumerate(samples):
        d, h, w = sample["image"].shape[1:]
        assert torch.equal(batch["anatomical_mask"][row, :d, :h, :w], sample["anatomical_mask"])
        assert batch["anatomical_mask"][row].count_nonzero() == sample["anatomical_mask"].count_nonzero()
        assert torch.equal(batch["target"][row], sample["target"])
    assert not batch["anatomical_mask"][2].any()  # it has none
    assert batch["prompt"] == [sample["prompt"] for sample in samples] and len(batch["report"]) == 3


def test_whole_scans_of_several_sizes_are_unknown_where_they_are_filled_up(cases, store):
    data = SeededDataset(cases, chain(store))
    batch = collate_padded([data[index] for index in (0, 2)])
    assert batch["target"].shape == (2, 5, 8, 16, 16) and batch["anatomical_mask"].shape == (2, 8, 16, 16)
    assert (batch["target"][0, :, 2:] == UNKNOWN).all() and (batch["target"][0, ..., 6:] == UNKNOWN).all()
    assert batch["valid_size"].tolist() == [[2, 16, 6], [8, 16, 16]]


def test_draws_are_those_of_seed_and_epoch(cases, store):
    def draws(seed, epoch):
        prompts = WritePromptd(store, finding_flips=0.5, lesion_dropout=0.5)
        transform = chain(store, prompts, **CROP, intensity_augmentation=0.2, mask_guidance_probability=0.5)
        data = SeededDataset(cases, transform, seed=seed)
        samples = [data[EpochIndex(epoch, index)] for index in range(5)]
        names = ("prompt", "use_anatomical_mask", "crop_start", "intensity_factor", "intensity_offset")
        return [[str(sample[name]) for name in names] for sample in samples]

    first, again = draws(0, 0), draws(0, 0)
    assert first == again
    for other in (draws(1, 0), draws(0, 1)):
        assert all(any(one[kind] != two[kind] for one, two in zip(first, other, strict=True)) for kind in range(5))
