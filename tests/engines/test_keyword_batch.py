import pytest
import torch
from monai.engines import SupervisedEvaluator
from torch import nn

from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch

BATCH = {
    "volume_id": ["train_1_a_1", "train_2_a_1"],
    "image": torch.full((2, 1), 2.0),
    "spacing_mm": torch.full((2, 1), 3.0),
    "labels": torch.zeros(2, 4),
    "extra": torch.full((2, 1), 5.0),
}


def test_every_tensor_but_image_and_labels_is_a_keyword():
    image, target, positional, keywords = PrepareKeywordBatch()(BATCH, "cpu")
    assert torch.equal(image, BATCH["image"]) and target is None and positional == ()
    assert list(keywords) == ["spacing_mm", "extra"] and torch.equal(keywords["extra"], BATCH["extra"])


def test_chosen_and_excluded_entries():
    assert list(PrepareKeywordBatch(keys=["labels"])(BATCH)[3]) == ["labels"]
    assert list(PrepareKeywordBatch(exclude=["extra", "labels"])(BATCH)[3]) == ["spacing_mm"]
    assert "image" not in PrepareKeywordBatch(exclude=[])(BATCH)[3]  # it is passed already


def test_all_are_moved():
    image, _, _, keywords = PrepareKeywordBatch()(BATCH, "meta")
    assert image.device.type == "meta" and {value.device.type for value in keywords.values()} == {"meta"}
    image, _, _, keywords = PrepareKeywordBatch(keys=["extra"])(BATCH, "cpu", dtype=torch.float64)
    assert image.dtype == keywords["extra"].dtype == torch.float64


class _Sum(nn.Module):
    def forward(self, image, spacing_mm, extra):
        return image + 10 * spacing_mm + 100 * extra


def test_monai_calls_the_network_with_them():
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=[BATCH],
        network=_Sum(),
        prepare_batch=PrepareKeywordBatch(),
        decollate=False,
    )
    evaluator.run()
    assert evaluator.state.output["pred"].flatten().tolist() == [532.0, 532.0]


def test_another_entry_can_stand_in_the_images_place():
    features, _, _, keywords = PrepareKeywordBatch(keys=["labels"], image_key="spacing_mm")(BATCH)
    assert torch.equal(features, BATCH["spacing_mm"]) and list(keywords) == ["labels"]
    assert list(PrepareKeywordBatch(image_key="spacing_mm")(BATCH)[3]) == ["image", "extra"]


def test_optional_entries_are_passed_where_the_batch_has_them():
    prepare = PrepareKeywordBatch(keys=["spacing_mm"], optional_keys=["valid_size", "extra"])
    assert list(prepare(BATCH)[3]) == ["spacing_mm", "extra"]
    smaller = {key: value for key, value in BATCH.items() if key != "extra"}
    assert list(prepare(smaller)[3]) == ["spacing_mm"]
    assert list(prepare({**smaller, "valid_size": torch.ones(2, 3)}, "meta")[3]["valid_size"].shape) == [2, 3]
    with pytest.raises(KeyError, match="spacing_mm"):
        prepare({"image": BATCH["image"]})
