"""The prefix says what was seen, whatever the order of tokens and whatever fills up a batch."""

import pytest
import torch

from vlm3d_ext.networks.blocks import VisionToLLMProjector


def make_projector(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"num_queries": 5, "num_layers": 2, "num_heads": 4, "num_regions": 6, **settings}
    return VisionToLLMProjector(12, 16, **settings)


def make_features(tokens=7, regions=6, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 12), (batch, regions, 12), (batch, tokens, 12))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_the_order_of_local_tokens_does_not_matter():
    projector, (whole, regions, local) = make_projector(), make_features()
    shuffled = local[:, torch.randperm(7, generator=torch.Generator().manual_seed(0))]
    prefix = projector(whole, regions, local)
    assert prefix.shape == (2, 5, 16)
    torch.testing.assert_close(projector(whole, regions, shuffled), prefix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("filling", [0.0, 1000.0])
def test_tokens_that_fill_up_a_batch_change_nothing_whatever_they_hold(filling):
    projector, (whole, regions, local) = make_projector(), make_features()
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 7:] = False
    mask[1, 4:] = False
    filled = torch.cat([local, torch.zeros(2, 3, 12)], dim=1)
    filled = torch.where(mask[..., None], filled, torch.randn(2, 10, 12) + filling)
    prefix = projector(whole, regions, filled, mask)
    torch.testing.assert_close(prefix[0], projector(whole, regions, local)[0], rtol=1e-5, atol=1e-6)
    alone = projector(whole[1:], regions[1:], local[1:, :4])
    torch.testing.assert_close(prefix[1], alone[0], rtol=1e-5, atol=1e-6)
    # and what is not masked counts
    assert not torch.allclose(projector(whole, regions, filled)[0], prefix[0], rtol=1e-3)


def test_a_mask_of_real_tokens_alone_is_no_mask():
    projector, (whole, regions, local) = make_projector(), make_features()
    everything = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(projector(whole, regions, local, everything), projector(whole, regions, local))


def test_each_kind_of_feature_is_heard():
    projector, features = make_projector(), make_features()
    prefix = projector(*features)
    for place in range(3):
        changed = [value.clone() for value in features]
        changed[place][0] += torch.randn(12, generator=torch.Generator().manual_seed(3))
        got = projector(*changed)
        assert (got[0] - prefix[0]).abs().max() > 0.01 * prefix[0].abs().max()
        torch.testing.assert_close(got[1], prefix[1], rtol=1e-5, atol=1e-6)  # the other scan's is its own


def test_regions_are_told_apart_by_their_embeddings_alone():
    projector, (whole, regions, local) = make_projector(), make_features()
    torch.nn.init.normal_(projector.region_embeddings)
    exchanged = regions[:, [1, 0, 2, 3, 4, 5]]
    prefix = projector(whole, regions, local)
    assert not torch.allclose(projector(whole, exchanged, local), prefix, rtol=1e-3)
    torch.nn.init.zeros_(projector.region_embeddings)
    prefix = projector(whole, regions, local)
    torch.testing.assert_close(projector(whole, exchanged, local), prefix, rtol=1e-5, atol=1e-6)


def test_the_global_feature_is_told_from_a_local_one_by_its_embedding_alone():
    projector, (whole, regions, local) = make_projector(), make_features()
    exchanged = local.clone()
    exchanged[:, 0] = whole
    torch.nn.init.normal_(projector.global_embedding)
    prefix = projector(whole, regions, local)
    assert not torch.allclose(projector(local[:, 0], regions, exchanged), prefix, rtol=1e-3)
    torch.nn.init.zeros_(projector.global_embedding)
    prefix = projector(whole, regions, local)
    torch.testing.assert_close(projector(local[:, 0], regions, exchanged), prefix, rtol=1e-5, atol=1e-6)


def test_images_without_regions_are_projected_too():
    projector, (whole, regions, local) = make_projector(), make_features()
    without = projector(whole, regions[:, :0], local)
    assert without.shape == (2, 5, 16) and not torch.allclose(without, projector(whole, regions, local), rtol=1e-3)


def test_embeddings_begin_as_large_as_the_words_do():
    for scale in (0.02, 0.5):
        prefix = make_projector(output_scale=scale)(*make_features())
        size = prefix.square().mean(-1).sqrt()
        torch.testing.assert_close(size, torch.full_like(size, scale), rtol=1e-3, atol=0)


def test_queries_give_embeddings_of_their_own():
    prefix = make_projector()(*make_features())[0]
    similarity = torch.nn.functional.cosine_similarity(prefix[:, None], prefix[None], dim=-1)
    assert (similarity - torch.eye(5)).abs().max() < 0.95


def test_the_full_size_has_256_million_weights():
    """At the width of Llama 3.1 8B, within two in a hundred of the figure that the design names."""
    with torch.device("meta"):
        projector = VisionToLLMProjector(768, 4096)
    num_parameters = sum(weight.numel() for weight in projector.parameters())
    assert num_parameters == 259_136_768
    assert abs(num_parameters / 256e6 - 1) < 0.02


def test_the_number_of_weights_by_hand():
    projector = make_projector(mlp_ratio=1.5)
    layer = 2 * 16 + 2 * (16 * 16 + 16) + 2 * 16 + (16 * 24 + 24) + (24 * 16 + 16)
    key_value, embeddings = 12 * 32 + 32, 12 + 6 * 12 + 5 * 16
    expected = 2 * 12 + embeddings + key_value + 2 * layer + 2 * 16
    assert sum(weight.numel() for weight in projector.parameters()) == expected


def test_gradients_reach_every_weight_and_every_feature():
    projector, features = make_projector(), make_features()
    for value in features:
        value.requires_grad_()
    prefix = projector(*features)
    (prefix * torch.randn(prefix.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for name, weight in projector.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name
    assert all((value.grad.abs().flatten(1).sum(1) > 0).all() for value in features)
    assert (projector.queries.grad.abs().sum(1) > 0).all()
    assert (projector.region_embeddings.grad.abs().sum(1) > 0).all()


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="width 16 is no multiple of 5 heads; choose another projector_heads"):
        make_projector(num_heads=5)
