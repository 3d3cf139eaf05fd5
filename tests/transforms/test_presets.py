import torch

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest, with_and_without_mask
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.text.sentence_bank import SentenceBank
from vlm3d_ext.transforms import (
    LoadPreparedCased,
    classification_transforms,
    encoder_pretraining_transforms,
    network_image,
    prepared_case_transforms,
)


def _pretraining(cases, **options):
    return encoder_pretraining_transforms((2, 4, 4), 0.5, SentenceBank.from_cases(cases, 512), **options)


def _image_of(sample):
    return network_image(torch.utils.data.default_collate([sample]))


def _same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) and not value.isnan().any() else True
        for key, value in first.items()
    )


def test_inference_draws_nothing_and_uses_the_mask_as_told(tmp_path):
    case = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")[0]
    with_mask, without = prepared_case_transforms(True)(case), prepared_case_transforms(False)(case)
    assert with_mask["use_anatomical_mask"].item() is True and without["use_anatomical_mask"].item() is False
    assert "report" not in with_mask
    assert torch.equal(with_mask["image"], LoadPreparedCased()(case)["image"])


def test_pretraining_is_reproducible_and_changes_with_the_epoch(tmp_path):
    cases = CaseManifest(make_prepared_release(tmp_path, (2, 1, 1))).cases("training")
    first, second = (SeededDataset(cases, _pretraining(cases, intensity_augmentation=0.2), seed=1) for _ in range(2))
    assert _same(first[EpochIndex(2, 0)], second[EpochIndex(2, 0)])
    assert not torch.equal(first[EpochIndex(2, 0)]["patch_mask"], first[EpochIndex(3, 0)]["patch_mask"])
    images = [_image_of(first[EpochIndex(epoch, 0)]) for epoch in range(4)]
    assert not all(torch.equal(image, images[0]) for image in images)


def test_without_augmentation_the_image_is_the_case_itself(tmp_path):
    cases = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")
    dataset = SeededDataset(cases, _pretraining(cases))
    for epoch in range(3):
        assert torch.equal(dataset[EpochIndex(epoch, 0)]["image"], LoadPreparedCased()(cases[0])["image"])


def test_what_the_network_takes_can_be_put_into_batches(tmp_path):
    """Cases with and without a mask and a report have the same shapes."""
    cases = CaseManifest(make_prepared_release(tmp_path, (5, 1, 1))).cases("training")
    dataset = SeededDataset(cases, _pretraining(cases, num_true_sentences=3, num_untrue_sentences=4))
    batch = torch.utils.data.default_collate([dataset[index] for index in range(5)])
    assert batch["has_anatomical_mask"].tolist() == [True, True, True, False, True]
    assert batch["sentence_mask"].any(1).tolist() == [True, True, True, True, False]
    assert batch["patch_mask"].sum(1).tolist() == [32] * 5  # half of 4 x 4 x 4 tokens


def test_classification_draws_masks_and_intensities_by_the_seed(tmp_path):
    cases = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")
    datasets = [SeededDataset(cases, classification_transforms(0.5, 0.2), seed=1) for _ in range(2)]
    first, second = ([dataset[EpochIndex(epoch, 0)] for epoch in range(12)] for dataset in datasets)
    assert all(_same(one, other) for one, other in zip(first, second, strict=True))
    assert {sample["use_anatomical_mask"].item() for sample in first} == {True, False}
    assert len({_image_of(sample).sum().item() for sample in first}) > 3
    assert set(first[0]) >= {"volume_id", "image", "labels", "anatomical_mask", "spacing_mm", "use_anatomical_mask"}
    assert "report" not in first[0]


def test_classification_without_augmentation_takes_the_case_and_what_it_says(tmp_path):
    cases = CaseManifest(make_prepared_release(tmp_path, (4, 1, 1))).cases("training")
    dataset = SeededDataset(with_and_without_mask(cases), classification_transforms())
    samples = [dataset[EpochIndex(epoch, index)] for epoch in (0, 1) for index in range(7)]
    assert [sample["use_anatomical_mask"].item() for sample in samples] == [*[False] * 4, *[True] * 3] * 2
    assert torch.equal(samples[5]["image"], LoadPreparedCased()(cases[1])["image"])
    torch.utils.data.default_collate(samples)
