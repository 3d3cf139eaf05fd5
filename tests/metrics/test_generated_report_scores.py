"""The scores of an epoch are those of all its reports together, not means of batches."""

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator

from tests.engines.reported_cases import EXTRACTOR, GENERATED, REFERENCES, make_labels
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.metrics import GeneratedReportScores, count_decisions
from vlm3d_ext.metrics.report_rewards import ReportReward
from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts

REWARD = ReportReward(EXTRACTOR)
FINISHED = [True, True, False, True]
LABELS = make_labels()
LABELS[1, EXTRACTOR.keys.index("emphysema")] = np.nan


class GivenReports(torch.nn.Module):
    """Writes the reports whose numbers stand in the image."""

    def forward(self, numbers):
        numbers = numbers.tolist()
        finished = torch.tensor([FINISHED[number] for number in numbers])
        token_ids = torch.zeros(len(numbers), 1, dtype=torch.long)
        return GeneratedTexts(token_ids, token_ids == 0, finished, [GENERATED[number] for number in numbers])


def make_batch(*numbers):
    return {
        "image": torch.tensor(numbers),
        "labels": torch.from_numpy(LABELS[list(numbers)]).float(),
        "report": [REFERENCES[number] for number in numbers],
    }


def run(*epochs):
    """Return the metrics after the last of several epochs, each given as its batches."""
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=epochs[0],
        network=GivenReports(),
        prepare_batch=PrepareKeywordBatch([]),
        key_val_metric={"clinical_f1": GeneratedReportScores(REWARD)},
        decollate=False,
    )
    for batches in epochs:
        evaluator.data_loader = batches
        evaluator.run()
    return evaluator.state.metrics


def test_two_batches_by_hand():
    metrics = run([make_batch(0, 1, 2), make_batch(3)])
    counts = count_decisions(LABELS, np.array([EXTRACTOR.labels(text) for text in GENERATED]) == 1)
    assert metrics["clinical_f1"] == pytest.approx(np.nanmean(counts.f1))
    # nodule 2/3, effusion 1, cardiomegaly 0, emphysema 1: where it was named wrongly its label is unknown
    assert metrics["clinical_f1"] == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)
    assert metrics["num_positives"] == pytest.approx((2 + 2 + 1 + 1) / 4)
    assert metrics["num_words"] == pytest.approx(np.mean([len(text.split()) for text in GENERATED]))
    assert metrics["finished"] == 3 / 4
    assert metrics["reward"] == pytest.approx(REWARD(GENERATED, FINISHED, REFERENCES, LABELS).total.mean())


def test_how_cases_come_in_batches_makes_no_difference():
    one = run([make_batch(0, 1, 2, 3)])
    assert run([make_batch(2), make_batch(3, 1), make_batch(0)]) == pytest.approx(one)
    # a mean of batches would be another figure
    apart = [run([make_batch(*numbers)])["clinical_f1"] for numbers in ((0, 1, 2), (3,))]
    assert np.mean(apart) != pytest.approx(one["clinical_f1"])


def test_each_epoch_begins_anew():
    first, second = [make_batch(0), make_batch(1)], [make_batch(2), make_batch(3)]
    assert run(first, second) == pytest.approx(run(second)) != pytest.approx(run(first + second))


def test_a_report_without_reward_leaves_the_mean():
    score = GeneratedReportScores(REWARD)
    batch = make_batch(0, 3)
    whole = score.reward(GENERATED[:1], [True], REFERENCES[:1], LABELS[:1]).total[0]
    batch["labels"][1] = float("nan")
    batch["report"][1] = ""
    format_only = REWARD(GENERATED[3:], [True], [""], batch["labels"][1:].numpy()).total[0]
    score.update((GivenReports()(batch["image"]), batch))
    assert score.figures()["reward"] == pytest.approx((whole + format_only) / 2)
    assert score.compute() == pytest.approx(1)  # nodule and effusion of the first case; of the second nothing is known


def test_without_a_known_positive_the_score_is_undefined():
    score = GeneratedReportScores(REWARD)
    score.update((GivenReports()(torch.tensor([2])), make_batch(2)))
    assert np.isnan(score.compute()) and score.figures()["num_positives"] == 1
