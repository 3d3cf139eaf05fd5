"""What the upstream networks say of a scan, averaged and put back on voxels by hand."""

import pytest
import torch
from torch import nn

from tests.networks.tiny_localizer import DISEASES, tiny_localizer, tiny_stages
from vlm3d_ext.networks.heads import MultiLabelClassifier
from vlm3d_ext.networks.nets import ScanEvidence, ThreeDVisionEncoder, VolumeClassifier
from vlm3d_ext.networks.nets.scan_evidence import have_equal_weights, pool_in_plane, predicted_regions

# --- averaging in-plane -----------------------------------------------------------------------------------------------


def test_neighbours_of_a_slab_are_averaged_and_slabs_are_not():
    features = torch.arange(2 * 2 * 4.0).view(1, 2, 2, 4, 1)
    # slab 0: rows 0 1 2 3 / 4 5 6 7; slab 1: 8 more
    expected = torch.tensor([[[[2.5], [4.5]]], [[[10.5], [12.5]]]])[None]
    torch.testing.assert_close(pool_in_plane(features, 2), expected)


def test_at_the_border_the_mean_is_over_what_is_there():
    features = torch.arange(9.0).view(1, 1, 3, 3, 1)
    expected = torch.tensor([[[2.0, 3.5], [6.5, 8.0]]])[..., None][None]
    torch.testing.assert_close(pool_in_plane(features, 2), expected)
    torch.testing.assert_close(pool_in_plane(features, 3), torch.full((1, 1, 1, 1, 1), 4.0))
    torch.testing.assert_close(pool_in_plane(features, 5), torch.full((1, 1, 1, 1, 1), 4.0))


def test_channels_and_scans_stay_apart():
    features = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    pooled = pool_in_plane(features, 2)
    assert pooled.shape == (2, 3, 3, 2, 6)
    torch.testing.assert_close(pooled[1, 2, 1, 0, 3], features[1, 2, 2:4, 0:2, 3].mean())
    torch.testing.assert_close(pooled[0, 1, 2, 1], features[0, 1, 4:5, 2:4].mean((0, 1)))
    assert pool_in_plane(features, 1) is features


# --- regions of voxels ------------------------------------------------------------------------------------------------


def logits_of(table, num_regions, seed=0):
    """Return logits (B, N, 2, 1 + R, K) whose most probable region in the first channel is `table` (B, N, K)."""
    noise = torch.rand(
        *table.shape[:2], 2, 1 + num_regions, table.shape[-1], generator=torch.Generator().manual_seed(seed)
    )
    noise[:, :, 0].scatter_(2, table[:, :, None], 2.0)
    return noise


def test_a_voxel_takes_its_tokens_answer_for_its_own_intensity():
    """Sizes 3 × 5 × 6 in patches of 2 × 2 × 4 make 2 × 3 × 2 tokens, of which those at the far ends are cut."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randint(0, 7, (2, 12, 4), generator=generator)
    image = torch.rand(2, 2, 3, 5, 6, generator=generator)
    image[0, 0, 0, 0, 0], image[0, 0, 2, 4, 5] = 0.0, 1.0
    got = predicted_regions(logits_of(table, 6), image, (2, 2, 4))
    assert got.dtype == torch.uint8 and got.shape == (2, 3, 5, 6)
    for scan in range(2):
        for k in range(3):
            for j in range(5):
                for i in range(6):
                    token = (k // 2) * 6 + (j // 2) * 2 + i // 4
                    intensity = min(int(float(image[scan, 0, k, j, i]) * 4), 3)
                    assert got[scan, k, j, i] == table[scan, token, intensity]


def test_one_bin_of_one_token_goes_to_a_region_and_nothing_else():
    table = torch.zeros(1, 4, 2, dtype=torch.long)
    table[0, 3, 1] = 5
    image = torch.zeros(1, 1, 2, 4, 4)
    image[0, 0, 1, 1:4, 2:4] = 0.9
    logits = logits_of(table, 6)[:, :, :1]
    expected = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    expected[0, 1, 2:4, 2:4] = 5  # the bright voxels of row 1 are in the token above
    assert torch.equal(predicted_regions(logits, image, (2, 2, 2)), expected)


# --- all networks -----------------------------------------------------------------------------------------------------

SIZE = (6, 16, 20)


@pytest.fixture(scope="module")
def scans():
    generator = torch.Generator().manual_seed(2)
    return {
        "image": torch.rand(2, 1, *SIZE, generator=generator),
        "anatomical_mask": torch.randint(0, 21, (2, *SIZE), generator=generator),
        "spacing_mm": torch.tensor([[3.0, 0.8, 0.8], [4.0, 0.7, 0.7]]),
    }


def make_evidence(localizer=True, **settings):
    stages = tiny_stages()
    encoder = stages["encoder"]
    # the encoder of a classifier is its own, as its checkpoint has it
    torch.manual_seed(5)
    classifier = MultiLabelClassifier(
        hidden_size=24, text_hidden_size=16, projection_dim=8, num_soft_tokens=2, num_attention_heads=2,
        attention_head_dim=3,
    )  # fmt: skip
    nn.init.normal_(classifier.text_embeddings)
    own = tiny_stages()["encoder"]
    for weight in own.parameters():
        weight.data += 0.01
    return ScanEvidence(encoder, VolumeClassifier(own, classifier), tiny_localizer() if localizer else None, **settings)


def test_evidence_is_what_the_networks_say(scans):
    network = make_evidence()
    got = network(**scans)
    features = network.encoder(scans["image"], scans["anatomical_mask"], scans["spacing_mm"])
    found = network.classifier(scans["image"], scans["anatomical_mask"], scans["spacing_mm"])
    torch.testing.assert_close(got.global_features, features.global_features)
    torch.testing.assert_close(got.region_features, features.region_features)
    tokens = features.local_features.view(2, 3, 4, 5, 24)
    assert got.local_features.shape == (2, 3, 2, 3, 24)
    torch.testing.assert_close(got.local_features[1, 2, 1, 2], tokens[1, 2, 2:4, 4].mean(0))
    torch.testing.assert_close(got.probabilities, found["probabilities"])
    assert torch.equal(got.predictions, found["predictions"].bool())
    drawn = network.localizer(scans["image"], scans["spacing_mm"])["probabilities"]
    assert got.lesion_probabilities.shape == (2, DISEASES, *SIZE)
    torch.testing.assert_close(got.lesion_probabilities, drawn)


def test_the_classifier_reads_its_own_encoder(scans):
    network = make_evidence(localizer=False)
    before = network(**scans)
    for weight in network.encoder.parameters():
        weight.data += 0.05
    after = network(**scans)
    torch.testing.assert_close(after.probabilities, before.probabilities, rtol=0, atol=0)
    assert not torch.allclose(after.global_features, before.global_features)


def test_equal_encoders_are_run_once_and_say_the_same(scans, monkeypatch):
    network = make_evidence()
    for part in (network.classifier, network.localizer):
        part.encoder.load_state_dict(network.encoder.state_dict())
    use = torch.tensor([False, True])
    apart = network.classifier(*scans.values(), use), network.localizer(scans["image"], scans["spacing_mm"])
    runs, encode = [], ThreeDVisionEncoder.encode_tokens
    monkeypatch.setattr(ThreeDVisionEncoder, "encode_tokens", lambda *a: runs.append(1) or encode(*a))
    got = network(**scans, use_anatomical_mask=use)
    assert len(runs) == 1
    assert torch.equal(got.probabilities, apart[0]["probabilities"])
    assert torch.equal(got.lesion_probabilities, apart[1]["probabilities"])
    network.localizer.encoder.norm.bias.data[3] += 0.5  # as fine-tuning would
    again = network(**scans, use_anatomical_mask=use)
    assert len(runs) == 3
    assert torch.equal(again.probabilities, got.probabilities)
    assert not torch.allclose(again.lesion_probabilities, got.lesion_probabilities)


def test_one_digit_makes_weights_unequal():
    one, other = (tiny_stages()["encoder"] for _ in range(2))
    assert have_equal_weights(one, other)
    other.norm.weight.data[-1] = torch.nextafter(other.norm.weight.data[-1], torch.tensor(2.0))
    assert not have_equal_weights(one, other)


def test_masks_count_where_they_are_used(scans):
    network = make_evidence(localizer=False)
    mask = scans["anatomical_mask"].to(torch.uint8)
    used = network(**scans)
    assert torch.equal(used.regions, mask) and used.regions.dtype == torch.uint8
    plain = network(scans["image"], None, scans["spacing_mm"])
    logits = network.encoder(scans["image"], None, scans["spacing_mm"]).bin_region_logits
    assert torch.equal(plain.regions, predicted_regions(logits, scans["image"], network.encoder.patch_size))
    assert not torch.equal(plain.regions, mask)
    one = network(**scans, use_anatomical_mask=torch.tensor([False, True]))
    assert torch.equal(one.regions[0], plain.regions[0]) and torch.equal(one.regions[1], mask[1])
    torch.testing.assert_close(one.region_features[0], plain.region_features[0])
    torch.testing.assert_close(one.region_features[1], used.region_features[1])
    torch.testing.assert_close(one.probabilities[0], plain.probabilities[0])


def test_without_localizer_no_lesions_are_drawn(scans):
    assert make_evidence(localizer=False)(**scans).lesion_probabilities is None


def test_the_networks_stay_frozen_and_in_evaluation(scans):
    network = make_evidence()
    assert network.train() is network
    assert not any(module.training for module in network.modules())
    nn.Sequential(network).train()  # as part of something else
    assert not any(module.training for module in network.modules())
    assert not any(weight.requires_grad for weight in network.parameters())
    scans["image"].requires_grad_()
    evidence = network(**scans)
    scans["image"].requires_grad_(False)
    assert not evidence.local_features.requires_grad and not evidence.lesion_probabilities.requires_grad


def test_pooling_of_one_keeps_every_token(scans):
    network = make_evidence(localizer=False, pooling=1)
    assert network(**scans).local_features.shape == (2, 3, 4, 5, 24)
