"""The joint network's findings after validation: the classifier's calibration, then both heads' weights."""

import numpy as np
import pytest
import torch
from ignite.engine import Engine

from tests.networks.tiny_multitask import tiny_multitask
from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.handlers import MultiTaskCalibrator
from vlm3d_ext.metrics import fit_calibration
from vlm3d_ext.metrics.lesion_fusion import fit_lesion_fusion


class Scores:
    """The metric, with 30 cases: consolidation is known by its lesions alone, nodules have a single positive."""

    def __init__(self, names, diseases):
        random = np.random.default_rng(0)
        labels = random.integers(0, 2, (30, 18)).astype(float)
        nodule = names.index("Lung nodule")
        labels[:, nodule] = 0
        labels[3, nodule] = 1
        self.labels = np.concatenate([labels, np.full((30, 5), np.nan)], axis=1)
        evidence = random.normal(size=(30, 5))
        evidence[:, diseases.index("Consolidation")] = np.where(labels[:, names.index("Consolidation")] == 1, 6, -6)
        self.logits = np.concatenate([random.normal(size=(30, 18)), evidence], axis=1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return tiny_multitask(make_tiny_language_model(tmp_path_factory.mktemp("lm") / "tiny", max_positions=2048))


def test_findings_are_calibrated_and_drawn_ones_fused(network):
    classifier = network.classification.classifier
    names, diseases = classifier.label_set.names, network.localization.disease_set.names
    scores = Scores(list(names), list(diseases))
    nodule, consolidation = names.index("Lung nodule"), names.index("Consolidation")
    network.fuse(nodule, 1.0, 1.0, 1.0)  # of an earlier validation
    MultiTaskCalibrator(network, scores)(Engine(lambda engine, batch: None))

    alone = fit_calibration(scores.logits[:, :18], scores.labels[:, :18])
    assert float(classifier.temperature) == pytest.approx(alone.temperature, rel=1e-5)
    fused = network.is_fused.tolist()
    assert fused[consolidation] and not fused[nodule]
    assert sum(fused) == 3  # pericardial and pleural effusion, too
    expected = fit_lesion_fusion(
        scores.logits[:, consolidation], scores.logits[:, 18 + diseases.index("Consolidation")],
        scores.labels[:, consolidation],
    )  # fmt: skip
    torch.testing.assert_close(
        network.fusion[consolidation], torch.tensor([expected.classifier, expected.lesion, expected.offset])
    )
    probabilities = expected.probabilities(
        scores.logits[:, consolidation], scores.logits[:, 18 + diseases.index("Consolidation")]
    )
    decided = probabilities >= float(classifier.thresholds[consolidation])
    assert np.array_equal(decided, scores.labels[:, consolidation] == 1)
    others = [index for index in range(18) if not fused[index]]
    np.testing.assert_allclose(classifier.thresholds[others].numpy(), alone.thresholds[others], rtol=1e-5)
