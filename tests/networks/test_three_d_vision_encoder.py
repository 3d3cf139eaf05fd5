import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm3d_ext.networks.layers import ACTIVATION_CHECKPOINTING, region_shares_of_mask
from vlm3d_ext.networks.nets import RegionTokenEncoder, ThreeDVisionEncoder

SMALL = {
    "patch_size": (2, 4, 4),
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_depth_heads": 1,
    "mlp_dim": 64,
}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ThreeDVisionEncoder(**SMALL).eval()


def _mask(*size):
    return torch.randint(0, 21, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_shapes_with_odd_sizes(encoder):
    features = encoder(torch.rand(2, 1, 5, 13, 18), spacing_mm=torch.tensor([[5.0, 1, 1], [1.0, 1, 1]]))
    tokens = 3 * 4 * 5
    assert features.global_features.shape == (2, 48)
    assert features.local_features.shape == (2, tokens, 48)
    assert features.region_features.shape == (2, 20, 48)
    assert features.region_logits.shape == (2, tokens, 21)
    assert features.token_mask is not None and features.token_mask.all()  # each token holds at least one real voxel


def test_region_shares_by_hand():
    mask = torch.zeros(1, 2, 4, 8, dtype=torch.uint8)
    mask[0, :, :, 4:] = 7
    mask[0, 0, :, 4:] = 20
    shares = region_shares_of_mask(mask, (2, 4, 4), 20)
    assert shares.shape == (1, 2, 21)
    assert shares[0, 0, 0] == 1
    assert shares[0, 1, 7] == 0.5 and shares[0, 1, 20] == 0.5
    odd = region_shares_of_mask(mask[:, :1], (2, 4, 4), 20)
    assert odd[0, 1, 20] == 0.5 and odd[0, 1, 0] == 0.5  # what is added to fill the patch is background


def test_padding_changes_nothing(encoder):
    """Voxels appended behind a volume, named as padding, leave its features as they are, whatever they contain."""
    torch.manual_seed(1)
    image, mask = torch.rand(1, 1, 6, 16, 12), _mask(1, 6, 16, 12)
    spacing = torch.tensor([[3.0, 0.8, 0.8]])
    alone = encoder(image, mask, spacing)
    padded_image = torch.nn.functional.pad(image, (0, 8, 0, 4, 0, 4), value=0.7)
    padded_mask = torch.nn.functional.pad(mask, (0, 8, 0, 4, 0, 4), value=3)
    padded = encoder(padded_image, padded_mask, spacing, valid_size=torch.tensor([[6, 16, 12]]))
    torch.testing.assert_close(alone.global_features, padded.global_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.region_features, padded.region_features, rtol=1e-4, atol=1e-5)
    real = padded.token_mask[0]
    assert real.sum() == 3 * 4 * 3
    torch.testing.assert_close(alone.local_features[0], padded.local_features[0][real], rtol=1e-4, atol=1e-5)


def test_volumes_of_a_batch_do_not_mix(encoder):
    torch.manual_seed(1)
    images, masks = torch.rand(3, 1, 4, 8, 8), _mask(3, 4, 8, 8)
    spacing = torch.tensor([[5.0, 1, 1], [2.0, 1, 1], [1.0, 0.5, 0.5]])
    use = torch.tensor([True, False, True])
    together = encoder(images, masks, spacing, use)
    for row in range(3):
        one = slice(row, row + 1)
        alone = encoder(images[one], masks[one] if use[row] else None, spacing[one])
        torch.testing.assert_close(together.region_features[one], alone.region_features, rtol=1e-4, atol=1e-5)


def test_mask_guides_the_region_features_and_nothing_else(encoder):
    torch.manual_seed(1)
    image = torch.rand(1, 1, 4, 8, 8)
    with_mask, without = encoder(image, _mask(1, 4, 8, 8)), encoder(image)
    torch.testing.assert_close(with_mask.local_features, without.local_features)
    assert not torch.allclose(with_mask.region_features, without.region_features, atol=1e-3)


def _tell_regions_by_intensity(encoder, regions):
    """Let the encoder give all voxels of a bin to one region, wherever they are."""
    logits = torch.zeros(encoder.in_channels, 21, encoder.num_intensity_bins)
    for intensity_bin, region in enumerate(regions):
        logits[:, region, intensity_bin] = 60.0
    torch.nn.init.zeros_(encoder.region_classifier.weight)
    encoder.region_classifier.bias.data = logits.flatten()


def test_a_right_prediction_is_worth_the_mask(encoder):
    """Regions that differ in intensity, predicted as such, are measured as the mask would measure them."""
    mask = torch.where(torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.3, 4, 7)
    image = torch.where(mask == 4, 0.05, 0.95)[:, None]
    _tell_regions_by_intensity(encoder, [4, 4, 4, 4, 7, 7, 7, 7])
    guided, unguided = encoder(image, mask), encoder(image)
    torch.testing.assert_close(unguided.region_features, guided.region_features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        unguided.region_logits.softmax(-1), region_shares_of_mask(mask, (2, 4, 4), 20), rtol=1e-4, atol=1e-4
    )
    _tell_regions_by_intensity(encoder, [7, 7, 7, 7, 4, 4, 4, 4])
    assert not torch.allclose(encoder(image).region_features, guided.region_features, atol=1e-2)


def test_region_shares_follow_from_bins_and_histogram():
    torch.manual_seed(0)
    encoder = ThreeDVisionEncoder(in_channels=2, num_intensity_bins=3, **SMALL).eval()
    image = torch.rand(1, 2, 2, 4, 4)  # one token
    features = encoder(image)
    assert features.bin_region_logits.shape == (1, 1, 2, 21, 3)
    of_bins = features.bin_region_logits[0, 0].softmax(1)
    expected = torch.zeros(21)
    for channel in range(2):
        for value in image[0, channel].flatten().tolist():
            expected += of_bins[channel, :, int(value * 3)] / (2 * 32)
    torch.testing.assert_close(features.region_logits[0, 0].softmax(-1), expected)


def test_tokens_count_their_voxels(encoder):
    """Beside what is linear in the voxels, a token knows how many of them are how bright, wherever they lie in it."""
    torch.nn.init.zeros_(encoder.patch_embedding.weight)
    even, mixed, moved = torch.full((3, 1, 1, 2, 4, 4), 0.5)
    mixed[:, :, 0], mixed[:, :, 1] = 0.1, 0.9
    moved[:, :, :, :2], moved[:, :, :, 2:] = 0.9, 0.1
    features = [encoder(image).local_features for image in (even, mixed, moved)]
    torch.testing.assert_close(features[1], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-2)


def test_spacing_is_seen(encoder):
    image = torch.rand(1, 1, 8, 8, 8)
    thin, thick = (encoder(image, spacing_mm=torch.tensor([[z, 1.0, 1.0]])).global_features for z in (1.0, 5.0))
    assert not torch.allclose(thin, thick, atol=1e-3)


def test_hidden_patches_are_not_seen(encoder):
    torch.manual_seed(1)
    image = torch.rand(1, 1, 4, 8, 8)
    hidden = torch.zeros(1, 8, dtype=torch.bool)
    hidden[0, :4] = True  # the first slab
    other = image.clone()
    other[:, :, :2] = torch.rand(1, 1, 2, 8, 8)
    first, second = (encoder(x, patch_mask=hidden).local_features for x in (image, other))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, encoder(image).local_features, atol=1e-3)


def test_region_prediction_is_taught_by_masks_only(encoder):
    encoder.train()
    features = encoder(torch.rand(1, 1, 4, 8, 8))
    features.region_features.sum().backward()
    assert encoder.region_classifier.weight.grad is None
    features = encoder(torch.rand(1, 1, 4, 8, 8))
    features.region_logits.square().sum().backward()
    assert encoder.region_classifier.weight.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for mode in ACTIVATION_CHECKPOINTING:
        torch.manual_seed(0)
        encoder = ThreeDVisionEncoder(**SMALL, activation_checkpointing=mode).train()
        encoder(torch.ones(1, 1, 4, 8, 8) * 0.3).global_features.square().sum().backward()
        gradients.append(encoder.patch_embedding.weight.grad)
    for others in gradients[1:]:
        assert torch.equal(others, gradients[0])


def test_export_encoder_has_the_same_weights_and_features(encoder):
    for_export = RegionTokenEncoder(**SMALL).eval()
    for_export.load_state_dict(encoder.state_dict())
    image = torch.rand(2, 1, 4, 8, 8)
    features = encoder(image)
    pred = for_export(image)
    assert pred.shape == (2, 21, 48)
    torch.testing.assert_close(pred[:, 0], features.global_features)
    torch.testing.assert_close(pred[:, 1:], features.region_features)


def test_errors_say_what_to_do(encoder):
    with pytest.raises(ValueError, match=r"built for 1 input channel.*--window"):
        encoder(torch.rand(1, 2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"attention must be one of .*'sparse'"):
        ThreeDVisionEncoder(**SMALL, attention="sparse")


def test_full_size_parameters_and_flops():
    """The source's 88M within 3 %, and at most 0.27 of full attention's operations, counted without running."""
    flops = {}
    with torch.device("meta"):
        for attention in ("slice_aware", "full"):
            encoder = ThreeDVisionEncoder(attention=attention).to("meta")
            with FlopCounterMode(display=False) as counter:
                encoder(torch.zeros(1, 1, 64, 512, 512))
            flops[attention] = counter.get_total_flops()
    num_parameters = sum(parameter.numel() for parameter in encoder.parameters())
    assert num_parameters == 88_963_752
    assert abs(num_parameters / 88e6 - 1) < 0.03
    assert flops["slice_aware"] / flops["full"] <= 0.27


@pytest.mark.slow
def test_full_size_forward():
    torch.manual_seed(0)
    encoder = ThreeDVisionEncoder().eval()
    begin = time.perf_counter()
    with torch.inference_mode():
        features = encoder(torch.rand(1, 1, 64, 512, 512), spacing_mm=torch.tensor([[4.7, 0.74, 0.74]]))
    print(f"full-size forward: {time.perf_counter() - begin:.1f} s")
    assert features.global_features.shape == (1, 768)
    assert features.local_features.shape == (1, 16384, 768)
    assert features.region_features.shape == (1, 20, 768)
    assert all(torch.isfinite(part).all() for part in features if part is not None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_agrees_with_cpu(encoder):
    image, mask = torch.rand(2, 1, 4, 8, 8), _mask(2, 4, 8, 8)
    expected = encoder(image, mask)
    result = encoder.cuda()(image.cuda(), mask.cuda())
    torch.testing.assert_close(result.region_features.cpu(), expected.region_features, rtol=1e-3, atol=1e-3)
