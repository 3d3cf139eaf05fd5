import torch

from vlm3d_ext.networks.layers import (
    pad_to_patches,
    region_histograms_of_tokens,
    region_shares_of_mask,
    volume_to_patches,
)


def test_patches_are_the_blocks_of_the_volume():
    volume = torch.arange(2 * 1 * 4 * 6 * 4, dtype=torch.float32).view(2, 1, 4, 6, 4)
    patches = volume_to_patches(volume, (2, 3, 2))
    assert patches.shape == (2, 2 * 2 * 2, 12)
    torch.testing.assert_close(patches[1, 0], volume[1, 0, :2, :3, :2].flatten())
    torch.testing.assert_close(patches[0, 5], volume[0, 0, 2:, :3, 2:].flatten())  # token (1, 0, 1)
    two_channels = volume_to_patches(torch.cat([volume, volume + 1000], dim=1), (2, 3, 2))
    torch.testing.assert_close(two_channels[:, :, 12:], patches + 1000)


def test_padding_appends_zeros_and_only_where_needed():
    volume = torch.ones(1, 1, 3, 4, 5)
    padded = pad_to_patches(volume, (2, 2, 4))
    assert padded.shape == (1, 1, 4, 4, 8)
    assert padded.sum() == volume.sum()
    assert pad_to_patches(volume, (3, 2, 5)) is volume


def test_histograms_by_hand():
    image = torch.tensor([0.0, 0.1, 0.6, 1.0]).view(1, 1, 1, 2, 2)
    mask = torch.tensor([0, 2, 2, 2], dtype=torch.uint8).view(1, 1, 2, 2)
    counts = region_histograms_of_tokens(image, mask, (1, 2, 2), num_regions=2, num_bins=2)
    assert counts.shape == (1, 1, 1, 3, 2)
    assert counts[0, 0, 0].tolist() == [[0.25, 0.0], [0.0, 0.0], [0.25, 0.5]]
    without = region_histograms_of_tokens(image, None, (1, 2, 2), num_regions=2, num_bins=2)
    assert without[0, 0, 0].tolist() == [[0.5, 0.5]]


def test_histograms_add_up_to_shares_and_to_the_token():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 2, 5, 9, 8, generator=generator) * 1.4 - 0.2  # beyond [0, 1] on both sides
    mask = torch.randint(0, 21, (2, 5, 9, 8), generator=generator, dtype=torch.uint8)
    counts = region_histograms_of_tokens(image, mask, (2, 4, 4), num_regions=20, num_bins=8)
    shares = region_shares_of_mask(mask, (2, 4, 4), 20)
    torch.testing.assert_close(counts.sum(-1)[:, :, 0], shares)
    torch.testing.assert_close(counts.sum(-1)[:, :, 1], shares)
    alone = region_histograms_of_tokens(image, None, (2, 4, 4), num_regions=20, num_bins=8)
    torch.testing.assert_close(counts.sum(3), alone[:, :, :, 0])
