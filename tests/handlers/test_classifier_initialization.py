import pytest
import torch
from torch.utils.data import DataLoader

from tests.handlers.tiny_classifier import NAMES, make_cases, make_trainer, make_training
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.handlers import ClassifierInitialization
from vlm3d_ext.networks.layers import FeatureMoments, FeatureWhitening

TRAINED = [index % 3 != 1 for index in range(len(NAMES))]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert")


def whitening_of(cases):
    features = torch.stack([case["features"] for case in cases])
    moments = FeatureMoments(*features.shape[1:])
    moments.add(features)
    whitening = FeatureWhitening(*features.shape[1:])
    whitening.fit(moments)
    return whitening


def run(text_folder, cases, max_cases=None, epochs=1):
    training = make_training(text_folder)
    handler = ClassifierInitialization(training, DataLoader(cases, 5), TRAINED, max_cases)
    trainer = make_trainer(training, cases, handler, epochs=epochs)
    trainer.run()
    return training, trainer


def test_whitening_is_that_of_all_training_features(text_folder):
    cases = make_cases(15)
    training, _ = run(text_folder, cases)
    own, expected = training.network.classifier.whitening, whitening_of(cases)
    torch.testing.assert_close(own.mean, expected.mean)
    torch.testing.assert_close(own.matrix, expected.matrix, atol=1e-4, rtol=1e-4)


def test_as_many_cases_as_are_enough(text_folder):
    """Whole batches of 5, until there are at least 7."""
    cases = make_cases(20)
    training, _ = run(text_folder, cases, max_cases=7)
    torch.testing.assert_close(training.network.classifier.whitening.mean, whitening_of(cases[:10]).mean)
    exactly, _ = run(text_folder, cases, max_cases=5)
    torch.testing.assert_close(exactly.network.classifier.whitening.mean, whitening_of(cases[:5]).mean)


def test_findings_and_text_encoder_are_noted(text_folder):
    training, _ = run(text_folder, make_cases(10))
    classifier = training.network.classifier
    assert classifier.trained_findings.tolist() == TRAINED
    assert bytes(classifier.text_encoder_sha256.tolist()).hex() == training.text_encoder.embeddings_sha256


def test_training_follows_and_leaves_the_statistics_alone(text_folder):
    cases = make_cases(15)
    training, trainer = run(text_folder, cases, epochs=2)
    assert trainer.state.iteration == 6 and training.training
    torch.testing.assert_close(training.network.classifier.whitening.mean, whitening_of(cases).mean)


def test_too_few_cases_are_refused(text_folder):
    with pytest.raises(ValueError, match="at least 2 cases, got 1"):
        run(text_folder, make_cases(1))
