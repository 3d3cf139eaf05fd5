import numpy as np
import pytest
import torch

from tests.handlers.tiny_classifier import make_cases, make_classifier, make_evaluator, make_training
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.handlers import ClassifierCalibrator
from vlm3d_ext.metrics import MultiLabelScores, fit_calibration, rescale_to_half


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert")


def test_buffers_are_the_calibration_of_the_epoch(text_folder):
    training, cases = make_training(text_folder).eval(), make_cases(30)
    classifier, scores = training.network.classifier, MultiLabelScores(num_cases=30)
    evaluator = make_evaluator(
        training,
        cases,
        ClassifierCalibrator(classifier, scores),
        keys=["labels"],
        key_val_metric={"macro_auroc": scores},
    )
    evaluator.run()
    labels = torch.stack([case["labels"] for case in cases])
    with torch.no_grad():
        logits = training(torch.stack([case["features"] for case in cases]), labels)["logits"]
    calibration = fit_calibration(logits.double().numpy(), labels.double().numpy())
    assert classifier.temperature.item() == pytest.approx(calibration.temperature, rel=1e-4)
    np.testing.assert_allclose(classifier.offsets.numpy(), calibration.offsets, atol=1e-4)
    np.testing.assert_allclose(classifier.thresholds.numpy(), calibration.thresholds, atol=1e-4)
    assert classifier.temperature.item() != 1 and classifier.thresholds.std() > 0.01
    assert classifier.thresholds[-1] == 0.5  # without a positive, nothing can be chosen
    # what the classifier says from now on is what was fitted
    output = classifier(torch.stack([case["features"] for case in cases]))
    np.testing.assert_allclose(output["probabilities"].detach(), calibration.probabilities(logits), atol=1e-4)


def test_a_further_epoch_replaces_it(text_folder):
    training = make_training(text_folder)
    classifier, scores = training.network.classifier, MultiLabelScores()
    options = {"keys": ["labels"], "key_val_metric": {"macro_auroc": scores}}
    evaluator = make_evaluator(training, make_cases(30), ClassifierCalibrator(classifier, scores), **options)
    evaluator.run()
    first = classifier.offsets.clone()
    evaluator.run()
    assert torch.equal(classifier.offsets, first)
    with torch.no_grad():
        classifier.logit_bias += 3
    evaluator.run()
    assert not torch.allclose(classifier.offsets, first)


def test_thresholds_stay_below_one():
    """A label of which two cases are known, both with a sure yes, one wrongly: at 1, nothing could be rescaled."""
    classifier, scores = make_classifier(), MultiLabelScores()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 18, generator=generator) * 2
    labels = (torch.rand(400, 18, generator=generator) < logits.sigmoid()).float()
    labels[:, 0] = float("nan")
    logits[:2, 0], labels[:2, 0] = torch.tensor([40.0, 30.0]), torch.tensor([1.0, 0.0])
    scores.update((logits, labels))
    scores.compute()
    assert np.float32(fit_calibration(scores.logits, scores.labels).thresholds[0]) == 1
    ClassifierCalibrator(classifier, scores)(None)
    thresholds = classifier.thresholds.double().numpy()
    assert (thresholds < 1).all() and thresholds[0] > 0.9999
    assert rescale_to_half(np.full((1, 18), 0.9), thresholds)[0, 0] < 0.5
