import numpy as np
import pytest
import torch
from monai.transforms import Compose, Lambda, Randomizable, RandScaleIntensityd, RandShiftIntensityd, Transform
from torch.utils.data import default_collate

from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.transforms import RandIntensityFactord, RandIntensityOffsetd, network_image

GREY_LEVELS = np.arange(2 * 3 * 5 * 9, dtype=np.uint8).reshape(2, 3, 5, 9)


class _Draw(Randomizable, Transform):
    def __call__(self, data):
        return {**data, "drawn": int(self.R.randint(1 << 30))}


def _as_numbers(data):
    return {**data, "image": torch.from_numpy(data["image"].numpy().astype(np.float32) / 255.0)}


def _datasets(images, size):
    data = [{"image": torch.from_numpy(image)} for image in images]
    monai = [RandScaleIntensityd("image", factors=size, prob=0.5), RandShiftIntensityd("image", offsets=size, prob=0.5)]
    ours = [RandIntensityFactord(size), RandIntensityOffsetd(size)]
    return [
        SeededDataset(data, Compose([*first, *steps, _Draw()]), seed=4)
        for first, steps in (([Lambda(_as_numbers)], monai), ([], ours))
    ]


def test_all_grey_levels_become_what_division_by_255_gives():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 4, 8, 8)
    image = network_image({"image": torch.from_numpy(levels)}, "cpu")
    assert image.dtype == torch.float32
    np.testing.assert_array_equal(image.numpy(), levels.astype(np.float32) / 255.0)


def test_draws_and_voxels_are_those_of_monais_transforms():
    monai, ours = _datasets([GREY_LEVELS], 0.3)
    kinds = set()
    for epoch in range(40):
        expected, sample = monai[EpochIndex(epoch, 0)], ours[EpochIndex(epoch, 0)]
        assert sample["drawn"] == expected["drawn"]  # later transforms draw as before
        assert torch.equal(network_image(default_collate([sample]))[0], expected["image"].as_tensor())
        kinds.add((sample["intensity_factor"].item() == 1, sample["intensity_offset"].item() == 0))
    assert len(kinds) == 4  # neither, either and both were changed


def test_each_sample_of_a_batch_has_its_own_and_what_is_filled_up_stays_black():
    images = [GREY_LEVELS, GREY_LEVELS[:, :2, :4, :7], GREY_LEVELS[:, :, :3] + np.uint8(7)]
    monai, ours = _datasets(images, 0.3)
    epoch = next(e for e in range(40) if all(ours[EpochIndex(e, i)]["intensity_offset"] != 0 for i in range(3)))
    expected, batch = (collate_padded([data[EpochIndex(epoch, i)] for i in range(3)]) for data in (monai, ours))
    assert torch.equal(network_image(batch), expected["image"].as_tensor())
    assert not network_image(batch)[1, :, 2:].any()


def test_the_batch_itself_is_left_alone():
    batch = {"image": torch.from_numpy(GREY_LEVELS)[None].clone(), "intensity_factor": torch.tensor([1.5])}
    network_image(batch)
    assert batch["image"].dtype == torch.uint8 and torch.equal(batch["image"][0], torch.from_numpy(GREY_LEVELS))
    numbers = {"image": torch.full((1, 2), 3.0)}
    assert network_image(numbers, "cpu") is numbers["image"]  # numbers are left as they are


def test_networks_get_numbers_and_not_what_was_drawn_for_them():
    batch = {
        "image": torch.from_numpy(GREY_LEVELS)[None],
        "intensity_factor": torch.tensor([1.5]),
        "intensity_offset": torch.tensor([0.25]),
        "spacing_mm": torch.ones(1, 3),
    }
    image, _, _, keywords = PrepareKeywordBatch()(batch, "cpu")
    assert torch.equal(image, batch["image"].float() / 255 * 1.5 + 0.25) and list(keywords) == ["spacing_mm"]
    doubles = PrepareKeywordBatch()(batch, "cpu", dtype=torch.float64)[0]
    assert doubles.dtype == torch.float64 and torch.equal(doubles, image.double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 4, 8, 8)
    batch = {"image": levels, "intensity_factor": torch.tensor([1.1]), "intensity_offset": torch.tensor([-0.03])}
    assert torch.equal(network_image(batch, "cuda").cpu(), network_image(batch, "cpu"))
