"""One task's share of a prediction, of single-task networks and of the joint one."""

import torch

from vlm3d_ext.handlers.task_predictions import (
    classification_ways,
    lesion_probabilities,
    own_classification,
    written_reports,
)
from vlm3d_ext.networks.nets.image_prefix_language_model import GeneratedTexts

OUTPUT = {name: torch.rand(2, 3) for name in ("logits", "probabilities", "predictions")}
GUIDED = {name: torch.rand(2, 3) for name in OUTPUT}
BATCH = {
    "volume_id": ["a", "b"],
    "use_anatomical_mask": torch.tensor([False, True]),
    "has_anatomical_mask": torch.tensor([True, False]),
}
TEXTS = GeneratedTexts(torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2), ["Clear lungs.", "A nodule."])


def test_a_single_task_classification_is_its_own_and_guided_as_the_batch_says():
    assert own_classification(OUTPUT) is OUTPUT
    ((output, guided, counts),) = classification_ways(OUTPUT, BATCH)
    assert output is OUTPUT and guided.tolist() == [False, True] and counts.tolist() == [True, True]


def test_a_joint_classification_may_have_two_ways_of_which_the_second_counts_where_there_is_a_mask():
    batch = {**BATCH, "use_anatomical_mask": torch.tensor([False, False])}
    joint = {"classification": OUTPUT, "guided_classification": GUIDED}
    assert own_classification(joint) is OUTPUT
    (first, unguided, all_of_them), (second, guided, with_mask) = classification_ways(joint, batch)
    assert first is OUTPUT and unguided.tolist() == [False, False] and all_of_them.tolist() == [True, True]
    assert second is GUIDED and guided.tolist() == [True, True] and with_mask.tolist() == [True, False]
    assert len(classification_ways({"classification": OUTPUT}, batch)) == 1


def test_lesions_are_stacked_in_the_order_of_the_diseases():
    probabilities = torch.rand(2, 2, 3, 4, 5)
    assert lesion_probabilities({"probabilities": probabilities}, ["nodule", "effusion"]) is probabilities
    joint = {"localization": {"nodule": probabilities[:, 0], "effusion": probabilities[:, 1]}}
    assert torch.equal(lesion_probabilities(joint, ["nodule", "effusion"]), probabilities)
    assert torch.equal(lesion_probabilities(joint, ["effusion", "nodule"]), probabilities.flip(1))


def test_reports_of_the_generator_are_asked_for_by_the_batch():
    batch = {**BATCH, "prompt": ["p", "q"], "num_lesions_left_out": torch.tensor([0, 3]), "evidence_of": ["c", "b"]}
    written = written_reports(TEXTS, batch)
    assert written.generated is TEXTS and written.prompts == ["p", "q"]
    assert written.num_lesions_left_out == [0, 3] and written.evidence_of == ["c", "b"]


def test_the_joint_network_asks_itself():
    generation = {"generated": TEXTS, "prompt": ["own p", "own q"], "num_lesions_left_out": [1, 0]}
    written = written_reports({"generation": generation}, BATCH)
    assert written.generated is TEXTS and written.prompts == ["own p", "own q"]
    assert written.num_lesions_left_out == [1, 0] and written.evidence_of == ["a", "b"]
