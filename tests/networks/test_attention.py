import math

import pytest
import torch

from vlm3d_ext.networks.layers import FullAttention, RegionAwareAttention, RotaryDepthEmbedding, SliceAwareAttention


def _reference_attention(q, k, v, allowed):
    """Softmax attention of single queries written as loops over tokens: q, k, v (N, E), allowed (N, N)."""
    rows = []
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if allowed[i, j]]
        weights = torch.stack([q[i] @ k[j] / math.sqrt(q.shape[1]) for j in keys]).softmax(0)
        rows.append(sum(weight * v[j] for weight, j in zip(weights, keys, strict=True)))
    return torch.stack(rows)


def _reference_slice_aware(layer, x, rotation):
    """The same layer token by token, for one volume (D, P, C)."""
    depth, places, channels = x.shape
    tokens = x.reshape(-1, channels)
    slab = torch.arange(depth).repeat_interleave(places)
    place = torch.arange(places).repeat(depth)
    qkv = layer.qkv(tokens).view(len(tokens), 3, layer.num_heads, -1)
    outputs = []
    for head in range(layer.num_heads):
        q, k, v = qkv[:, :, head].unbind(1)
        if head < layer.num_heads - layer.num_depth_heads:
            allowed = slab[:, None] == slab[None]
        else:
            allowed = place[:, None] == place[None]
            cosine, sine = (part[slab] for part in rotation)
            half = q.shape[1] // 2
            q, k = (
                torch.cat([t[:, :half] * cosine - t[:, half:] * sine, t[:, half:] * cosine + t[:, :half] * sine], 1)
                for t in (q, k)
            )
        outputs.append(_reference_attention(q, k, v, allowed))
    return layer.out_proj(torch.cat(outputs, dim=1)).view(depth, places, channels)


def test_slice_aware_attention_equals_a_plain_reference():
    torch.manual_seed(0)
    layer = SliceAwareAttention(hidden_size=24, num_heads=4, num_depth_heads=1).double()
    rotary = RotaryDepthEmbedding(6).double()
    x = torch.randn(2, 5, 7, 24, dtype=torch.float64)
    z_mm = torch.tensor([[-20.0, -10, 0, 10, 20], [-6, -3, 0, 3, 6]], dtype=torch.float64)
    rotation = rotary(z_mm)
    result = layer(x, rotation)
    for row in range(2):
        expected = _reference_slice_aware(layer, x[row], tuple(part[row] for part in rotation))
        torch.testing.assert_close(result[row], expected, rtol=1e-10, atol=1e-10)


def test_full_attention_equals_a_plain_reference():
    torch.manual_seed(0)
    layer = FullAttention(hidden_size=12, num_heads=2).double()
    x = torch.randn(1, 3, 4, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x.view(12, 12)).view(12, 3, 2, 6).unbind(1)
    everything = torch.ones(12, 12, dtype=torch.bool)
    heads = [_reference_attention(q[:, h], k[:, h], v[:, h], everything) for h in range(2)]
    torch.testing.assert_close(layer(x).view(12, 12), layer.out_proj(torch.cat(heads, 1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_class", [SliceAwareAttention, FullAttention])
def test_masked_tokens_do_not_reach_the_others(layer_class):
    torch.manual_seed(0)
    layer = layer_class(16, 4, 1)
    x = torch.randn(1, 4, 6, 16)
    mask = torch.ones(1, 4, 6, dtype=torch.bool)
    mask[:, 3] = False
    mask[:, :, 5] = False
    disturbed = torch.where(mask[..., None], x, torch.full_like(x, 50.0))
    kept = mask[0]
    torch.testing.assert_close(layer(x, token_mask=mask)[0][kept], layer(disturbed, token_mask=mask)[0][kept])
    cut = layer(x[:, :3, :5])
    torch.testing.assert_close(layer(x, token_mask=mask)[:, :3, :5], cut, rtol=1e-5, atol=1e-6)


def test_slice_aware_attention_keeps_far_tokens_apart():
    """A change in one token moves only its slab and its column; full attention would move everything."""
    torch.manual_seed(0)
    layer = SliceAwareAttention(16, 4, 2)
    x = torch.randn(1, 4, 6, 16)
    changed = x.clone()
    changed[0, 1, 2] += 1.0
    moved = (layer(x) - layer(changed)).abs().sum(-1)[0] > 1e-7
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1, :] = True
    expected[:, 2] = True
    assert torch.equal(moved, expected)


def test_rotation_depends_on_distance_only():
    rotary = RotaryDepthEmbedding(8)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 8)
    z_mm = torch.tensor([[0.0, 12.5, 40.0]])

    def logits(shift_mm):
        cosine, sine = rotary(z_mm + shift_mm)
        return rotary.rotate(q, cosine, sine) @ rotary.rotate(k, cosine, sine).transpose(-1, -2)

    torch.testing.assert_close(logits(0.0), logits(133.0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(0.0), q @ k.transpose(-1, -2), atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 1), "multiple of num_heads"),
        ((16, 4, 4), "num_depth_heads must lie"),
        ((16, 4, 0), "num_depth_heads must lie"),
    ],
)
def test_slice_aware_attention_refuses_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        SliceAwareAttention(*arguments)


def test_region_attention_returns_the_mean_of_its_tokens_when_untrained_output_is_zero():
    torch.manual_seed(0)
    layer = RegionAwareAttention(8, 2)
    torch.nn.init.zeros_(layer.out_proj.weight)
    torch.nn.init.zeros_(layer.out_proj.bias)
    tokens = torch.randn(1, 4, 8)
    shares = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.25, 0.0]]])
    result = layer(torch.randn(1, 2, 8), tokens, shares)
    torch.testing.assert_close(result[0, 0], tokens[0, 0])
    torch.testing.assert_close(result[0, 1], (2 * tokens[0, 1] + tokens[0, 2]) / 3)


def test_region_attention_weights_are_proportional_to_the_share():
    """With all keys equal, what is left of attention is share + floor."""
    torch.manual_seed(0)
    layer = RegionAwareAttention(4, 1, share_floor=0.1)
    torch.nn.init.zeros_(layer.query.weight)
    torch.nn.init.zeros_(layer.query.bias)
    tokens = torch.randn(1, 3, 4)
    shares = torch.tensor([[[0.9, 0.4, 0.0]]])
    values = layer.key_value(tokens).chunk(2, -1)[1][0]
    weights = torch.tensor([1.0, 0.5, 0.1]) / 1.6
    mean = (0.9 * tokens[0, 0] + 0.4 * tokens[0, 1]) / 1.3
    expected = mean + layer.out_proj((weights[:, None] * values).sum(0))
    torch.testing.assert_close(layer(torch.randn(1, 1, 4), tokens, shares)[0, 0], expected)
