import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from vlm3d_ext.networks.layers import volume_to_patches
from vlm3d_ext.networks.nets import EncoderPretraining, PretrainingHeads, ThreeDVisionEncoder

PATCH = (2, 4, 4)
SIZE = (5, 13, 10)  # 3 x 4 x 3 tokens, no axis a multiple of the patch
NUM_TOKENS = 36


@pytest.fixture
def network():
    torch.manual_seed(0)
    encoder = ThreeDVisionEncoder(
        patch_size=PATCH, hidden_size=24, num_layers=2, num_heads=3, num_depth_heads=1, mlp_dim=32
    )
    heads = PretrainingHeads(24, math.prod(PATCH), num_text_buckets=50, text_embedding_dim=8, projection_dim=16)
    return EncoderPretraining(encoder, heads)


def _batch(num_sentences=4, num_ngrams=6):
    generator = torch.Generator().manual_seed(1)

    def integers(high, *size):
        return torch.randint(0, high, size, generator=generator)

    return {
        "image": torch.rand(2, 1, *SIZE, generator=generator),
        "anatomical_mask": integers(21, 2, *SIZE).to(torch.uint8),
        "spacing_mm": torch.tensor([[5.0, 1, 1], [2.0, 0.8, 0.8]]),
        "has_anatomical_mask": torch.tensor([True, True]),
        "use_anatomical_mask": torch.tensor([True, False]),
        "patch_mask": integers(2, 2, NUM_TOKENS).bool(),
        "sentence_ngrams": integers(50, 2, num_sentences, num_ngrams),
        "sentence_regions": torch.stack([torch.zeros(2, 20), torch.ones(2, 20), *integers(2, 2, 2, 20)], 1).bool(),
        "sentence_is_true": torch.tensor([[True, False, True, False]] * 2),
        "sentence_mask": torch.tensor([[True, True, True, True], [True, True, True, False]]),
    }


def test_patches_hold_the_voxels_of_their_token():
    image = torch.arange(2 * 3 * 5 * 13 * 10, dtype=torch.float32).view(2, 3, 5, 13, 10)
    patches = volume_to_patches(image, PATCH)
    assert patches.sum(dtype=torch.float64) == image.sum(dtype=torch.float64)
    assert patches.shape == (2, NUM_TOKENS, 3 * 2 * 4 * 4)
    token = (1 * 4 + 2) * 3 + 1  # z 1, y 2, x 1
    assert torch.equal(patches[1, token].view(3, 2, 4, 4), image[1, :, 2:4, 8:12, 4:8])
    last = patches[0, -1].view(3, 2, 4, 4)
    assert torch.equal(last[:, :1, :1, :2], image[0, :, 4:, 12:, 8:])
    last[:, :1, :1, :2] = 0
    assert last.abs().sum() == 0  # what fills the last patches is zero


def test_losses_are_finite_and_reach_every_parameter(network):
    losses = network(**_batch())["losses"]
    assert sorted(losses) == ["reconstruction", "region_share", "report_alignment"]
    assert all(loss.isfinite() and loss.ndim == 0 and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    unreached = [
        name
        for name, parameter in network.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.abs().sum() == 0)
    ]
    assert unreached == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_an_untrained_network_starts_near_what_guessing_gives(network):
    losses = network(**_batch())["losses"]
    assert losses["region_share"].item() == pytest.approx(math.log(21), rel=0.1)


def test_the_losses_fall_when_trained(network):
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    batch, history = _batch(), []
    for _ in range(60):
        losses = network(**batch)["losses"]
        history.append(torch.stack(list(losses.values())).detach())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert (history[-1] < 0.85 * history[0]).all()


def test_reconstruction_is_of_hidden_tokens_only(network):
    batch, asked = _batch(), []
    network.heads.reconstruction.register_forward_hook(lambda module, inputs, output: asked.append(output))
    loss = network(**batch)["losses"]["reconstruction"]
    features = network.encoder(
        batch["image"],
        batch["anatomical_mask"],
        batch["spacing_mm"],
        batch["use_anatomical_mask"],
        patch_mask=batch["patch_mask"],
    ).local_features
    everywhere = torch.nn.functional.linear(
        features, network.heads.reconstruction.weight, network.heads.reconstruction.bias
    )
    torch.testing.assert_close(asked[0], everywhere[batch["patch_mask"]])
    error = (everywhere - volume_to_patches(batch["image"], PATCH)).abs().mean(-1)
    by_sample = [error[row][batch["patch_mask"][row]].mean() for row in range(2)]
    torch.testing.assert_close(loss, torch.stack(by_sample).mean())


def test_reconstruction_of_zero_by_hand(network):
    """Predicting black everywhere costs the mean brightness of the hidden patches."""
    batch = _batch()
    torch.nn.init.zeros_(network.heads.reconstruction.weight)
    torch.nn.init.zeros_(network.heads.reconstruction.bias)
    brightness = volume_to_patches(batch["image"], PATCH).mean(-1)
    expected = torch.stack([brightness[row][batch["patch_mask"][row]].mean() for row in range(2)]).mean()
    assert network(**batch)["losses"]["reconstruction"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_sentence_meets_the_regions_it_names(network):
    """Region features 3 and 7 decide over a sentence that names them, the global feature over one that names none."""
    torch.manual_seed(2)
    heads = network.heads
    ngrams = torch.randint(1, 50, (1, 2, 6))
    regions = torch.zeros(1, 2, 20, dtype=torch.bool)
    regions[0, 1, [2, 6]] = True
    global_features = torch.randn(1, 24, requires_grad=True)
    region_features = torch.randn(1, 20, 24, requires_grad=True)
    logits = heads.sentence_logits(global_features, region_features, ngrams, regions)

    text = heads.sentence_encoder(ngrams)
    sides = [global_features[0], region_features[0, [2, 6]].mean(0)]
    scale, bias = heads.log_logit_scale.exp(), heads.logit_bias
    assert scale.item() == pytest.approx(10.0) and bias.item() == -1.0
    for row, side in enumerate(sides):
        cosine = cosine_similarity(heads.image_projection(side), text[0, row], dim=0)
        assert logits[0, row].item() == pytest.approx((scale * cosine + bias).item(), rel=1e-4, abs=1e-5)

    (of_global,) = torch.autograd.grad(logits[0, 1], global_features, retain_graph=True)
    assert of_global.abs().sum() == 0
    (of_regions,) = torch.autograd.grad(logits[0, 1], region_features, retain_graph=True)
    assert (of_regions[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == [2, 6]
    (of_regions,) = torch.autograd.grad(logits[0, 0], region_features)
    assert of_regions.abs().sum() == 0


def _image_gradient(network, batch, loss):
    image = batch["image"].clone().requires_grad_()
    network(**{**batch, "image": image})["losses"][loss].backward()
    return image.grad.abs().flatten(1).sum(1)


@pytest.mark.parametrize(
    ("loss", "missing"),
    [("region_share", "has_anatomical_mask"), ("report_alignment", "sentence_mask"), ("reconstruction", "patch_mask")],
)
def test_a_sample_without_a_target_contributes_nothing_to_that_loss(network, loss, missing):
    batch = _batch()
    assert (_image_gradient(network, batch, loss) > 0).all()
    whole = network(**batch)["losses"][loss].item()
    batch[missing] = batch[missing].clone()
    batch[missing][1] = False
    gradient = _image_gradient(network, batch, loss)
    assert gradient[0] > 0 and gradient[1] == 0
    # it counts as zero in the mean, so that two ranks compute what one does
    half = network(**batch)["losses"][loss].item()
    alone = network(**{name: value[:1] for name, value in batch.items()})["losses"][loss].item()
    assert half == pytest.approx(alone / 2, rel=1e-4) and half < whole


def test_a_mask_that_is_all_zero_because_there_is_none_guides_nothing(network):
    """Else all 20 regions of such a case would be taken for absent."""
    batch = _batch()
    batch["has_anatomical_mask"] = torch.tensor([True, False])
    batch["anatomical_mask"][1] = 0
    losses = []
    for use in (False, True):
        batch["use_anatomical_mask"] = torch.tensor([False, use])
        losses.append(network(**batch)["losses"]["report_alignment"].item())
    assert losses[0] == losses[1]
    batch["has_anatomical_mask"] = torch.tensor([True, True])
    assert network(**batch)["losses"]["report_alignment"].item() != losses[0]


def test_sentences_that_are_not_there_change_nothing(network):
    batch = _batch()
    before = network(**batch)["losses"]["report_alignment"].item()
    batch["sentence_ngrams"] = batch["sentence_ngrams"].clone()
    batch["sentence_ngrams"][1, 3] = 17
    batch["sentence_is_true"] = batch["sentence_is_true"].clone()
    batch["sentence_is_true"][1, 3] = True
    assert network(**batch)["losses"]["report_alignment"].item() == before
