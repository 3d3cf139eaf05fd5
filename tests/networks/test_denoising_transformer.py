import pytest
import torch
from torch.nn.functional import layer_norm

from vlm3d_ext.networks.blocks import DenoisingTransformer
from vlm3d_ext.networks.blocks.denoising_transformer import TextCrossAttention
from vlm3d_ext.networks.layers import ACTIVATION_CHECKPOINTING

SMALL = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "num_depth_heads": 1, "mlp_dim": 32}
DEPTH_MM = torch.tensor([[-20.0, 0.0, 20.0], [-4.0, 0.0, 4.0]])


def _transformer(**options):
    torch.manual_seed(0)
    return DenoisingTransformer(**{**SMALL, **options})


def _inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 7, 24, generator=generator) * 3 + 1, torch.randn(2, 5, 24, generator=generator)


def test_no_loss_where_no_noise_is_put():
    features, texts = _inputs()
    assert _transformer().eval()(features, texts, DEPTH_MM).loss is None
    assert _transformer(max_noise=0.0).train()(features, texts, DEPTH_MM).loss is None
    assert _transformer(max_noise=0.1).train()(features, texts, DEPTH_MM).loss is not None


def test_without_noise_training_refines_as_evaluation_does():
    features, texts = _inputs()
    transformer = _transformer(max_noise=0.0)
    training, evaluation = (transformer.train(mode)(features, texts, DEPTH_MM).features for mode in (True, False))
    assert torch.equal(training, evaluation)
    assert not any(parameter.requires_grad for parameter in transformer.reconstruction.parameters())


def test_scale_and_offset_of_the_encoders_features_do_not_matter():
    features, texts = _inputs()
    transformer = _transformer().eval()
    expected = transformer(features, texts, DEPTH_MM).features
    result = transformer(5 * features - 2, texts, DEPTH_MM).features
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_loss_is_the_distance_from_the_clean_features():
    """With a reconstruction of zero the loss is the mean square of normalised features: the variance of 1 they have."""
    features, texts = _inputs()
    transformer = _transformer(max_noise=0.7).train()
    torch.nn.init.zeros_(transformer.reconstruction.weight)
    torch.nn.init.zeros_(transformer.reconstruction.bias)
    assert transformer(features, texts, DEPTH_MM).loss.item() == pytest.approx(1, abs=1e-4)


def test_loss_falls():
    features, texts = _inputs()
    transformer = _transformer(max_noise=0.3).train()
    optimizer = torch.optim.Adam(transformer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = transformer(features, texts, DEPTH_MM).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_the_noise_is_drawn_for_each_scan():
    """A copy of a scan in the same batch gets other noise, of another strength."""
    features, texts = _inputs()
    transformer = _transformer(max_noise=1.0).train()
    result = transformer(features[:1].repeat(2, 1, 1, 1), texts[:1].repeat(2, 1, 1), DEPTH_MM[:1].repeat(2, 1))
    assert not torch.allclose(result.features[0], result.features[1], atol=1e-2)


def test_padding_is_neither_seen_nor_counted():
    features, texts = _inputs()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[0, 2], mask[:, :, 5:] = False, False
    other = torch.where(mask[..., None], features, 50 * torch.rand_like(features))
    transformer = _transformer(max_noise=0.5)
    first, second = (transformer.eval()(x, texts, DEPTH_MM, mask).features for x in (features, other))
    torch.testing.assert_close(first[mask], second[mask], rtol=1e-4, atol=1e-5)
    alone = transformer(features[1:, :, :5], texts[1:], DEPTH_MM[1:]).features
    torch.testing.assert_close(first[1:, :, :5], alone, rtol=1e-4, atol=1e-5)

    transformer.train()
    losses = []
    for x in (features, other):
        torch.manual_seed(2)
        losses.append(transformer(x, texts, DEPTH_MM, mask).loss)
    torch.testing.assert_close(*losses)


def test_loss_weighs_scans_alike_however_much_is_padded():
    """The mean over scans of the mean over their real tokens, by hand."""
    features, texts = _inputs()
    mask = torch.ones(2, 3, 7, dtype=torch.bool)
    mask[0, 1:] = False
    transformer = _transformer(max_noise=0.5).train()
    torch.manual_seed(2)
    result = transformer(features, texts, DEPTH_MM, mask)
    error = (transformer.reconstruction(result.features) - layer_norm(features, (24,))).square().mean(-1)
    expected = (error[0, 0].mean() + error[1].mean()) / 2
    torch.testing.assert_close(result.loss, expected)


def test_tokens_hear_the_texts_in_no_order():
    features, texts = _inputs()
    transformer = _transformer().eval()
    expected = transformer(features, texts, DEPTH_MM).features
    shuffled = transformer(features, texts[:, [4, 2, 0, 1, 3]], DEPTH_MM).features
    torch.testing.assert_close(shuffled, expected, rtol=1e-4, atol=1e-5)
    changed = texts.clone()
    changed[0, 3] += 5
    result = transformer(features, changed, DEPTH_MM).features
    assert not torch.allclose(result[0], expected[0], atol=1e-3)
    torch.testing.assert_close(result[1], expected[1])  # the other scan's texts are its own


def test_cross_attention_by_hand():
    """One head: the softmax over null text and texts of q · k / sqrt(C), times v."""
    torch.manual_seed(0)
    attention = TextCrossAttention(hidden_size=6, num_heads=1)
    x, texts = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    result = attention(x, texts)
    for row in range(2):
        heard = torch.cat([attention.null_text, texts[row]])
        key, value = attention.key_value(heard).split(6, dim=1)
        for token in range(3):
            share = (key @ attention.query(x[row, token]) / 6**0.5).softmax(0)
            torch.testing.assert_close(result[row, token], attention.out_proj(share @ value), rtol=1e-4, atol=1e-5)


def test_checkpointing_gives_the_same_gradients():
    features, texts = _inputs()
    gradients = []
    for mode in ACTIVATION_CHECKPOINTING:
        transformer = _transformer(max_noise=0.0, activation_checkpointing=mode).train()
        transformer(features, texts, DEPTH_MM).features.square().sum().backward()
        gradients.append(transformer.blocks[0].attention.qkv.weight.grad)
    for others in gradients[1:]:
        assert torch.equal(others, gradients[0])
