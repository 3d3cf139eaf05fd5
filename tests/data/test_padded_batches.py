import torch

from vlm3d_ext.data.lesion_cases import UNKNOWN
from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.seeded_dataset import SeededDataLoader, SeededDataset


def sample(size, name="a", **more):
    image = torch.rand(2, *size, generator=torch.Generator().manual_seed(sum(size)))
    target = torch.ones(3, *size, dtype=torch.uint8)
    return {"volume_id": name, "image": image, "target": target, "spacing_mm": torch.tensor([5.0, 2.0, 2.0]), **more}


def test_one_scan_is_a_batch_as_it_is():
    only = sample((3, 5, 7))
    batch = collate_padded([only])
    assert set(batch) == {"volume_id", "image", "target", "spacing_mm"} and batch["volume_id"] == ["a"]
    assert torch.equal(batch["image"][0], only["image"]) and torch.equal(batch["target"][0], only["target"])


def test_scans_of_one_size_need_no_valid_size():
    batch = collate_padded([sample((3, 5, 7)), sample((3, 5, 7))])
    assert "valid_size" not in batch and batch["image"].shape == (2, 2, 3, 5, 7)


def test_smaller_scans_are_filled_up_at_the_ends_with_what_is_unknown():
    samples = [sample((3, 9, 4), "a"), sample((6, 5, 7), "b"), sample((6, 9, 7), "c")]
    batch = collate_padded(samples)
    assert batch["valid_size"].tolist() == [[3, 9, 4], [6, 5, 7], [6, 9, 7]]
    assert batch["image"].shape == (3, 2, 6, 9, 7) and batch["target"].shape == (3, 3, 6, 9, 7)
    assert batch["target"].dtype == torch.uint8
    for index, one in enumerate(samples):
        d, h, w = one["image"].shape[1:]
        assert torch.equal(batch["image"][index, :, :d, :h, :w], one["image"])
        outside = torch.ones(6, 9, 7, dtype=torch.bool)
        outside[:d, :h, :w] = False
        assert not batch["image"][index][:, outside].any()
        assert (batch["target"][index] == 1).sum() == 3 * d * h * w == one["target"].sum()
        assert (batch["target"][index] == UNKNOWN).sum() == 3 * (6 * 9 * 7 - d * h * w)
    assert samples[0]["image"].shape == (2, 3, 9, 4)  # the samples themselves are left alone


def test_what_a_transform_filled_up_counts_as_filled():
    """The image was 3 x 5 x 7 before it was filled up to 4 x 8 x 8, so all of the batch tells its size."""
    filled = sample((4, 8, 8), valid_size=torch.tensor([3, 5, 7]))
    assert collate_padded([filled])["valid_size"].tolist() == [[3, 5, 7]]
    mixed = collate_padded([filled, sample((4, 8, 8)), sample((6, 8, 8))])
    assert mixed["valid_size"].tolist() == [[3, 5, 7], [4, 8, 8], [6, 8, 8]]
    whole = sample((4, 8, 8), valid_size=torch.tensor([4, 8, 8]))
    assert "valid_size" not in collate_padded([whole, sample((4, 8, 8))])


def test_crops_are_left_as_they_are():
    """Scans of two sizes with two crops of 2 x 4 x 4 each, of three diseases; one crop is as large as its scan."""
    crops = torch.randint(0, 2, (2, 3, 2, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([[0, 0, 0], [2, 4, 0]])
    batch = collate_padded(
        [sample((2, 4, 4), target=crops, crop_start=starts), sample((4, 8, 4), target=1 - crops, crop_start=starts)]
    )
    assert torch.equal(batch["target"], torch.stack([crops, 1 - crops]))
    assert torch.equal(batch["crop_start"], torch.stack([starts, starts]))
    assert batch["valid_size"].tolist() == [[2, 4, 4], [4, 8, 4]]


def test_images_alone_are_batched_too():
    first, second = sample((3, 5, 7)), sample((4, 5, 7))
    del first["target"], second["target"]
    assert collate_padded([first, second])["valid_size"].tolist() == [[3, 5, 7], [4, 5, 7]]


def test_the_loader_hands_samples_to_it():
    dataset = SeededDataset([(3, 5, 7), (4, 5, 6), (3, 5, 7)], sample)
    loader = SeededDataLoader(dataset, 2, shuffle=False, collate_fn=collate_padded)
    sizes = [(batch["image"].shape[2:], "valid_size" in batch) for batch in loader]
    assert sizes == [((4, 5, 7), True), ((3, 5, 7), False)]
