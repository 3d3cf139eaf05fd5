import itertools
import math

import pytest
import torch
from torch.nn.functional import leaky_relu

from tests.networks.tiny_localizer import HIDDEN, PATCH, tiny_stages
from vlm3d_ext.networks.blocks import TextGuidedAttentionUNet
from vlm3d_ext.networks.blocks.text_guided_attention_unet import TextAttentionGate, TextGuidedHead, _interpolated

LEVELS = {  # whose voxels pass through PATCH: at the second level, the second, the stem, the last
    "image": {"stem_stride": (1, 1, 1), "level_strides": ((1, 2, 2), (2, 2, 2), (1, 2, 2))},
    "fine": {"stem_stride": (1, 2, 2), "level_strides": ((2, 2, 2), (2, 2, 2))},
    "tokens": {"stem_stride": (2, 4, 4), "level_strides": ((2, 2, 2), (2, 2, 2))},
    "bottom": {"stem_stride": (1, 2, 2), "level_strides": ((2, 2, 2),)},
}


def _unet(**options):
    return tiny_stages(**options)["unet"].eval()


def _inputs(size=(8, 16, 24), batch=2):
    generator = torch.Generator().manual_seed(1)
    grid = [-(-n // p) for n, p in zip(size, PATCH, strict=True)]
    return (
        torch.rand(batch, 1, *size, generator=generator),
        torch.randn(batch, *grid, HIDDEN, generator=generator),
        torch.randn(5, HIDDEN, generator=generator),
    )


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 4, 4)])
def test_head_puts_each_sub_voxel_where_it_lies(stride):
    """A head whose logit depends on nothing but the place inside the feature voxel: 100 z + 10 y + x."""
    torch.manual_seed(0)
    head = TextGuidedHead(3, 2, stride, head_channels=2)
    torch.nn.init.zeros_(head.controller[-1].weight)
    torch.nn.init.zeros_(head.controller[-1].bias)
    places = list(itertools.product(*(range(n) for n in stride)))
    head.controller[-1].bias.data[-len(places) :] = torch.tensor([100.0 * z + 10 * y + x for z, y, x in places])
    logits = head(torch.randn(1, 3, 2, 3, 2), torch.randn(2, 2))
    assert logits.shape == (1, 2, 2 * stride[0], 3 * stride[1], 2 * stride[2])
    z, y, x = (torch.arange(n * s) % s for n, s in zip((2, 3, 2), stride, strict=True))
    expected = 100 * z[:, None, None] + 10 * y[:, None] + x
    torch.testing.assert_close(logits, expected.float().expand_as(logits))


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 4, 4)])
def test_head_is_a_small_network_at_each_voxel(stride):
    """The grouped convolutions against a loop over scans, diseases and image voxels."""
    torch.manual_seed(0)
    head = TextGuidedHead(3, 4, stride, head_channels=2)
    features, texts = torch.randn(2, 3, 2, 1, 2), torch.randn(3, 4)
    logits = head(features, texts)
    drawn = math.prod(stride)
    for batch, disease in itertools.product(range(2), range(3)):
        weights = head.controller(texts[disease])
        first, first_bias, second, second_bias = weights.split([2 * 3, 2, drawn * 2, drawn])
        for z, y, x in itertools.product(*(range(n) for n in logits.shape[2:])):
            feature = features[batch, :, z // stride[0], y // stride[1], x // stride[2]]
            hidden = leaky_relu(first.view(2, 3) @ feature / 3**0.5 + first_bias, 0.01)
            inside = (z % stride[0] * stride[1] + y % stride[1]) * stride[2] + x % stride[2]
            logit = second.view(drawn, 2)[inside] @ hidden / 2**0.5 + second_bias[inside]
            torch.testing.assert_close(logits[batch, disease, z, y, x], logit, rtol=1e-4, atol=1e-5)


def test_untrained_head_draws_little():
    torch.manual_seed(0)
    head = TextGuidedHead(16, 32, (1, 2, 2))
    assert head(torch.randn(1, 16, 4, 4, 4), torch.randn(5, 32)).sigmoid().mean() < 0.25


def test_gate_begins_by_letting_everything_through():
    torch.manual_seed(0)
    gate = TextAttentionGate(4, 8, 6, (2, 2, 2))
    skip = torch.randn(2, 4, 4, 6, 8)
    torch.testing.assert_close(gate(skip, torch.randn(2, 8, 2, 3, 4), torch.randn(2, 5, 6)), skip)


def test_gate_by_hand():
    """At one scale: 2 sigmoid of a layer on skip, gate and what softmax attention hears of null text and texts."""
    torch.manual_seed(0)
    gate = TextAttentionGate(4, 3, 6, (1, 1, 1))
    torch.nn.init.normal_(gate.coefficients.weight)
    torch.nn.init.normal_(gate.null_key)
    skip, coarse, texts = torch.randn(2, 4, 2, 1, 3), torch.randn(2, 3, 2, 1, 3), torch.randn(2, 5, 6)
    result = gate(skip, coarse, texts)
    width = gate.skip.out_channels

    def layer(convolution, values):
        return convolution.weight.flatten(1) @ values + convolution.bias

    for batch, z, x in itertools.product(range(2), range(2), range(3)):
        fine, above = skip[batch, :, z, 0, x], coarse[batch, :, z, 0, x]
        key, value = gate.text_key_value(texts[batch]).split(width, dim=1)
        key, value = torch.cat([gate.null_key, key]), torch.cat([torch.zeros(1, width), value])
        heard = (key @ layer(gate.query, above) / width**0.5).softmax(0) @ value
        hidden = leaky_relu(layer(gate.skip, fine) + layer(gate.gate, above) + heard, 0.01)
        expected = fine * 2 * layer(gate.coefficients, hidden).sigmoid()
        torch.testing.assert_close(result[batch, :, z, 0, x], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", LEVELS)
def test_tokens_enter_where_they_lie(levels):
    """Another token changes one voxel of the token level, whichever that is, and the drawing around that patch."""
    unet = _unet(**LEVELS[levels])
    image, tokens, texts = _inputs((8, 16, 48), batch=1)
    other = tokens.clone()
    other[0, 2, 1, 9] *= -4
    seen = []
    level = unet.token_level
    if level + 1 < len(unet.down):
        unet.down[level + 1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    else:
        unet.gates[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        change = (unet(image, other, texts) - unet(image, tokens, texts)).abs().sum((0, 1))
    assert seen[0].shape[2:] == tokens.shape[1:4]
    assert (seen[1] - seen[0]).abs().sum((0, 1)).nonzero().tolist() == [[2, 1, 9]]
    centre = (change.sum((0, 1)) * torch.arange(48)).sum() / change.sum()
    assert abs(centre - (9 * 4 + 1.5)) < 6  # a patch and a half of a volume of twelve


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", [(1, 3, 5), (2, 4, 4), (7, 13, 18)])
def test_any_size_is_drawn(levels, size):
    unet = _unet(**LEVELS[levels])
    logits = unet(*_inputs(size))
    assert logits.shape == (2, 5, *size)
    assert torch.isfinite(logits).all()


def test_voxels_added_to_fill_the_coarsest_level_are_black():
    """A scan of odd size is drawn as the same scan with the black voxels and the absent tokens already there."""
    unet = _unet()
    image, tokens, texts = _inputs((7, 13, 18))
    filled = torch.nn.functional.pad(image, (0, 6, 0, 3, 0, 1))  # to multiples of (4, 8, 8)
    torch.testing.assert_close(unet(filled, tokens, texts)[:, :, :7, :13, :18], unet(image, tokens, texts))


def test_diseases_are_drawn_in_the_order_of_the_texts():
    unet = _unet()
    image, tokens, texts = _inputs()
    order = [3, 1, 4, 0, 2]
    expected = unet(image, tokens, texts)[:, order]
    torch.testing.assert_close(unet(image, tokens, texts[order]), expected, rtol=0, atol=1e-5)


def test_trunk_hears_all_texts_and_the_head_its_own():
    unet = _unet().double()
    image, tokens, texts = (part.double() for part in _inputs())
    before = unet(image, tokens, texts)
    other = texts.clone()
    other[2] *= -3
    change = (unet(image, tokens, other) - before).abs().amax((0, 2, 3, 4))
    assert (change > 1e-9).all() and change[2] > 10 * change[[0, 1, 3, 4]].max()
    heard = texts.expand(2, -1, -1)
    change = (unet(image, tokens, other, heard) - before).abs().amax((0, 2, 3, 4))
    assert (change[[0, 1, 3, 4]] == 0).all() and change[2] > 1e-2


def test_training_does_not_depend_on_the_scale_of_the_tokens():
    unet = _unet()
    image, tokens, texts = _inputs()
    torch.testing.assert_close(unet(image, 9 * tokens + 4, texts), unet(image, tokens, texts), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("base_channels", "millions"), [(32, 5.88), (48, 12.09), (64, 20.71)])
def test_parameters_of_the_shipped_widths(base_channels, millions):
    with torch.device("meta"):
        unet = TextGuidedAttentionUNet(base_channels=base_channels)
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_levels_that_miss_the_token_are_refused():
    with pytest.raises(ValueError, match=r"no level .* voxel \(4, 16, 16\).*\(8, 16, 16\).*change them, or patch_size"):
        TextGuidedAttentionUNet(level_strides=((2, 2, 2), (2, 2, 2), (2, 2, 2)))


@pytest.mark.parametrize("size", [(6, 8, 10), (5, 7, 9), (3, 4, 5)])
def test_interpolation_with_channels_last_is_interpolation(size):
    x = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    plain = torch.nn.functional.interpolate(x, size=size, mode="trilinear")
    fast = _interpolated(x, size)
    torch.testing.assert_close(fast, plain)
    assert fast.is_contiguous()  # what follows is computed as before
    weights = torch.randn(fast.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (fast, plain)]
    torch.testing.assert_close(*gradients)
