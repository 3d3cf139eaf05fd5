import pytest
import torch

from tests.handlers.tiny_classifier import NAMES, make_cases, make_classifier, make_evaluator
from vlm3d_ext.data.prediction_store import PredictionStore
from vlm3d_ext.handlers import PredictionWriter


@pytest.fixture
def classifier():
    classifier = make_classifier()
    classifier.thresholds.copy_(torch.linspace(0.3, 0.7, 18))
    classifier.offsets.copy_(torch.linspace(-1, 1, 18))
    classifier.trained_findings[::2] = True
    return classifier


def run(classifier, cases, folder):
    store = PredictionStore(folder, {"fingerprint": "f"})
    make_evaluator(classifier, cases, PredictionWriter(store, classifier)).run()
    return store


def test_each_volume_gets_what_the_classifier_says(tmp_path, classifier):
    cases = make_cases(10)
    store = run(classifier, cases, tmp_path)
    assert store.volume_ids() == sorted(case["volume_id"] for case in cases)
    output = classifier(torch.stack([case["features"] for case in cases]))
    for row, case in enumerate(cases):
        findings = store.read(case["volume_id"])
        assert list(findings) == list(NAMES)
        for column, finding in enumerate(findings.values()):
            assert finding["probability"] == pytest.approx(output["probabilities"][row, column].item(), abs=1e-5)
            assert finding["threshold"] == classifier.thresholds[column].item()
            assert finding["prediction"] == int(finding["probability"] >= finding["threshold"])
            assert finding["trained"] is (column % 2 == 0)
    assert {finding["prediction"] for finding in store.read(cases[0]["volume_id"]).values()} == {0, 1}


def test_columns_are_those_that_were_chosen(tmp_path, classifier):
    chosen = [classifier.label_set.findings[row] for row in (12, 3)]
    classifier.score_findings(chosen)
    cases = make_cases(2)
    findings = run(classifier, cases, tmp_path).read(cases[1]["volume_id"])
    assert list(findings) == [NAMES[12], NAMES[3]]
    assert findings[NAMES[3]]["threshold"] == classifier.thresholds[3].item()
    assert findings[NAMES[12]]["trained"] is True and findings[NAMES[3]]["trained"] is False


def test_what_was_written_before_a_failure_stays(tmp_path, classifier):
    cases = make_cases(8)
    cases[5]["features"] = cases[5]["features"][:3]  # the second batch of four cannot be put together
    with pytest.raises(RuntimeError):
        run(classifier, cases, tmp_path)
    store = PredictionStore(tmp_path)
    assert store.volume_ids() == sorted(case["volume_id"] for case in cases[:4])
    assert [case["volume_id"] for case in store.pending(cases)] == [case["volume_id"] for case in cases[4:]]
