import pytest
import torch

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.losses import WeightedBinaryCrossEntropy
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.networks.heads import MultiLabelClassifier
from vlm3d_ext.networks.nets import (
    ClassifierTraining,
    FeatureClassifierTraining,
    FindingProbabilities,
    ThreeDVisionEncoder,
    VolumeClassifier,
)

HIDDEN = 24
SPACING = torch.tensor([[5.0, 2.0, 2.0], [3.0, 2.0, 1.0]])


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return str(make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert"))


class CountingTextEncoder(PromptedTextEncoder):
    """A text encoder that counts how often it is asked."""

    num_calls = 0

    def embed_findings(self, *arguments, **keywords):
        self.num_calls += 1
        return super().embed_findings(*arguments, **keywords)


def make_training(text_folder, kind=ClassifierTraining, seed=0, **options):
    torch.manual_seed(seed)
    encoder = ThreeDVisionEncoder(
        patch_size=(4, 8, 8), hidden_size=HIDDEN, num_layers=1, num_heads=3, num_depth_heads=1, mlp_dim=16
    )
    classifier = MultiLabelClassifier(
        hidden_size=HIDDEN,
        text_hidden_size=16,
        projection_dim=8,
        num_soft_tokens=2,
        num_attention_heads=2,
        attention_head_dim=3,
    )
    loss = WeightedBinaryCrossEntropy([2.0] * 18)
    return kind(VolumeClassifier(encoder, classifier), CountingTextEncoder(text_folder), loss, **options)


def make_batch(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, 1, 8, 16, 24, generator=generator)
    labels = torch.randint(0, 2, (batch, 18), generator=generator).float()
    mask = torch.randint(0, 21, (batch, 8, 16, 24), generator=generator)
    return image, labels, mask


def make_features(batch=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 21, HIDDEN, generator=generator)
    return features, torch.randint(0, 2, (batch, 18), generator=generator).float()


def test_training_changes_the_classifier_and_nothing_else(text_folder):
    training = make_training(text_folder).train()
    classifier = training.network.classifier
    before = training.text_encoder.weights_sha256
    start = {name: value.clone() for name, value in training.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=0.01)
    image, labels, mask = make_batch()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = training(image, labels, mask, SPACING)["losses"]["classification"]
        loss.backward()
        assert classifier.soft_prompts.grad.abs().amax((1, 2)).all()  # of each finding
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert training.text_encoder.weights_sha256 == before
    for name, value in training.named_parameters():
        moved = not torch.equal(value, start[name])
        assert moved == name.startswith("network.classifier."), name
    # gradients pass the text encoder on their way to the soft prompts
    assert all(parameter.grad is None for parameter in training.text_encoder._held[0].parameters())
    assert not [name for name in training.state_dict() if "text_encoder" in name and "sha256" not in name]


def test_evaluation_gives_the_logits_of_the_live_text_encoder(text_folder):
    training = make_training(text_folder).eval()
    features, labels = make_features()
    image, labels, mask = make_batch()
    output = training(image, labels, mask, SPACING)
    classifier = training.network.classifier
    live, _ = classifier.embed_own_findings(training.text_encoder)
    features = training.network.features(image, mask, SPACING)
    for name, value in classifier(features, live).items():
        assert torch.equal(output[name], value)
    # and what the checkpoint holds needs no text encoder for them
    assert torch.equal(training.network(image, mask, SPACING)["logits"], output["logits"])


def test_the_loss_is_that_of_the_logits_and_labels(text_folder):
    training = make_training(text_folder, FeatureClassifierTraining).eval()
    features, labels = make_features()
    labels[0, :4] = float("nan")
    output = training(features, labels)
    assert torch.equal(output["losses"]["classification"], training.loss(output["logits"], labels))
    assert torch.equal(output["labels"].isnan(), labels.isnan())


def test_text_embeddings_are_computed_once_for_each_state_of_the_weights(text_folder):
    training = make_training(text_folder, FeatureClassifierTraining)
    classifier, text_encoder = training.network.classifier, training.text_encoder
    optimizer = torch.optim.SGD([p for p in training.parameters() if p.requires_grad], lr=0.1)
    features, labels = make_features()

    def evaluate():
        training.eval()
        with torch.no_grad():
            return training(features, labels)["logits"]

    first = evaluate()
    assert text_encoder.num_calls == 1
    assert torch.equal(evaluate(), first) and text_encoder.num_calls == 1
    training.train()
    training(features, labels)["losses"]["classification"].backward()
    assert text_encoder.num_calls == 2  # with gradients, so not from the buffer
    evaluate()
    assert text_encoder.num_calls == 2  # gradients alone change no weight
    optimizer.step()
    second = evaluate()
    assert text_encoder.num_calls == 3 and not torch.equal(second, first)
    with torch.no_grad():
        live = classifier(features, classifier.embed_own_findings(text_encoder)[0])["logits"]
    assert torch.equal(second, live)


@pytest.mark.parametrize("changed", ["soft_prompts", "text_projector.weight", "text_projector.bias"])
@pytest.mark.parametrize("by", ["loading", "changing one"])
def test_text_embeddings_follow_weights_that_are_changed(text_folder, changed, by):
    training = make_training(text_folder, FeatureClassifierTraining).eval()
    classifier = training.network.classifier
    features, labels = make_features()
    training(features, labels)
    state = {name: value.clone() for name, value in classifier.state_dict().items()}
    state[changed] += 0.5 * torch.randn(state[changed].shape, generator=torch.Generator().manual_seed(3))
    if by == "loading":
        classifier.load_state_dict(state)
    else:
        with torch.no_grad():
            classifier.get_parameter(changed).copy_(state[changed])
    output = training(features, labels)
    live = classifier(features, classifier.embed_own_findings(training.text_encoder)[0])
    assert torch.equal(output["logits"], live["logits"])
    assert not torch.equal(classifier.text_embeddings, state["text_embeddings"])


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_evaluation_mode(text_folder):
    training = make_training(text_folder).train()
    assert training.training and not training.network.encoder.training and training.network.classifier.training
    image, labels, mask = make_batch()
    training(image, labels, mask, SPACING)["losses"]["classification"].backward()
    assert all(parameter.grad is None for parameter in training.network.encoder.parameters())
    assert not training.features(image, mask, SPACING).requires_grad


def test_a_fine_tuned_encoder_gets_gradients(text_folder):
    training = make_training(text_folder, train_encoder=True).train()
    assert training.network.encoder.training
    image, labels, mask = make_batch()
    training(image, labels, mask, SPACING)["losses"]["classification"].backward()
    assert training.network.encoder.patch_embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not training.features(image, mask, SPACING).requires_grad


def test_from_features_it_is_what_it_is_from_volumes(text_folder):
    on_volumes = make_training(text_folder).eval()
    on_features = make_training(text_folder, FeatureClassifierTraining).eval()
    image, labels, mask = make_batch()
    use = torch.tensor([True, False])
    keywords = {"anatomical_mask": mask, "spacing_mm": SPACING, "use_anatomical_mask": use}
    features = on_volumes.features(image, **keywords)
    assert features.shape == (2, 21, HIDDEN) and torch.equal(on_features.features(features), features)
    expected = on_volumes(image, labels, **keywords)
    output = on_features(features, labels)
    assert torch.equal(output["logits"], expected["logits"])
    assert torch.equal(output["losses"]["classification"], expected["losses"]["classification"])


def test_features_are_the_global_one_and_then_the_regions(text_folder):
    network = make_training(text_folder).network.eval()
    image, _, mask = make_batch()
    given = network.encoder(image, anatomical_mask=mask, spacing_mm=SPACING)
    features = network.features(image, mask, SPACING)
    assert torch.equal(features[:, 0], given.global_features)
    assert torch.equal(features[:, 1:], given.region_features)


def test_what_is_exported_gives_the_probabilities_of_the_same_weights(text_folder):
    training = make_training(text_folder).eval()
    training.refresh_text_embeddings()
    network = training.network
    exported = FindingProbabilities(network.encoder, network.classifier).eval()
    assert exported.state_dict().keys() == network.state_dict().keys()
    image, _, _ = make_batch()
    assert torch.equal(exported(image), network(image)["probabilities"])


def test_mixup_mixes_features_and_labels_of_the_same_pairs(text_folder):
    """With labels that are a linear function of the features, they still are after mixing; unknown stays unknown."""
    training = make_training(text_folder, FeatureClassifierTraining, mixup_alpha=1.0).train()
    features, _ = make_features(batch=64)
    labels = features[:, 0, :18].clone()  # any numbers serve
    mixed, mixed_labels = training._mix(features, labels)
    torch.testing.assert_close(mixed_labels, mixed[:, 0, :18])
    assert not torch.equal(mixed, features) and mixed.std() < features.std()

    labels[::2, 3] = float("nan")
    torch.manual_seed(5)
    partner = torch.randperm(64)
    torch.manual_seed(5)
    unknown = torch.isnan(training._mix(features, labels)[1])
    assert torch.equal(unknown[:, 3], torch.isnan(labels[:, 3]) | torch.isnan(labels[partner, 3]))
    assert not unknown[:, :3].any() and not unknown[:, 4:].any()


def test_mixup_is_for_training_only(text_folder):
    mixing, plain = (make_training(text_folder, FeatureClassifierTraining, mixup_alpha=a) for a in (1.0, 0.0))
    features, labels = make_features(batch=8)
    with torch.no_grad():
        assert torch.equal(mixing.eval()(features, labels)["logits"], plain.eval()(features, labels)["logits"])
        assert not torch.equal(mixing.train()(features, labels)["labels"], labels)
        assert torch.equal(plain.train()(features, labels)["labels"], labels)
    with pytest.raises(ValueError, match="mixup_alpha must be at least 0, got -1"):
        make_training(text_folder, mixup_alpha=-1.0)


def test_soft_prompts_are_scaled_to_the_words_they_stand_among(text_folder):
    training = make_training(text_folder)
    classifier, before = training.network.classifier, training.network.classifier.soft_prompts.detach().clone()
    classifier.scale_soft_prompts(training.text_encoder)
    words = training.text_encoder._held[0].get_input_embeddings().weight
    torch.testing.assert_close(classifier.soft_prompts.std(), words.std())
    torch.testing.assert_close(classifier.soft_prompts / words.std(), before / before.std())
