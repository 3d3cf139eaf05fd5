import pytest
import torch

from tests.handlers.tiny_classifier import NAMES, make_cases, make_classifier, make_evaluator
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.handlers import FindingSelection
from vlm3d_ext.networks.blocks.prompted_text_encoder import PromptedTextEncoder
from vlm3d_ext.text.label_set import load_label_set

PROMPTS = {"Cyst": "A cyst is seen.", "Mass": {"positive": "A mass.", "negative": "No mass.", "regions": ["heart"]}}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return str(make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert"))


def trained_with(text_folder, pooling="mean"):
    classifier, text_encoder = make_classifier(), PromptedTextEncoder(text_folder, pooling)
    classifier.set_text_encoder(text_encoder)
    classifier.cache_text_embeddings(text_encoder)
    classifier.trained_findings[:-1] = True
    return classifier, text_encoder


def run(classifier, handler, num_cases=4):
    evaluator = make_evaluator(classifier, make_cases(num_cases), handler)
    evaluator.run()
    return evaluator.state.output["pred"]


def test_prompts_are_scored_beside_the_label_set(text_folder, caplog):
    classifier, text_encoder = trained_with(text_folder)
    features = torch.stack([case["features"] for case in make_cases(4)])
    own = classifier(features)["logits"]
    handler = FindingSelection(classifier, "ct_rate_18", PROMPTS, text_folder)
    assert classifier.scored_findings == classifier.label_set.findings  # nothing happens before the run
    with caplog.at_level("INFO"):
        output = run(classifier, handler)
    assert [finding.name for finding in classifier.scored_findings] == [*NAMES, "Cyst", "Mass"]
    assert output["logits"].shape == output["predictions"].shape == (4, 20)
    torch.testing.assert_close(output["logits"][:, :18], own, atol=1e-5, rtol=0)
    assert classifier.scored_is_trained == (*[True] * 17, False, False, False)
    assert f"never trained: {NAMES[-1]}, Cyst, Mass." in caplog.text
    classifier.score_findings(handler.findings, text_encoder)
    torch.testing.assert_close(classifier(features)["logits"], output["logits"], atol=1e-6, rtol=0)


def test_own_findings_need_no_text_encoder(tmp_path):
    """Nor is one loaded: a folder that is not there does not matter."""
    classifier = make_classifier()
    classifier.trained_findings.fill_(True)
    output = run(classifier, FindingSelection(classifier, "ct_rate_18", {}, str(tmp_path / "nothing")))
    assert output["logits"].shape == (4, 18) and all(classifier.scored_is_trained)


def test_another_label_set_by_name_or_as_it_is(text_folder):
    classifier, _ = trained_with(text_folder)
    outputs = []
    for label_set in ("vlm3d_18", load_label_set("vlm3d_18")):
        outputs.append(run(classifier, FindingSelection(classifier, label_set, text_model=text_folder))["logits"])
        assert classifier.scored_findings == load_label_set("vlm3d_18").findings
    assert torch.equal(*outputs)


def test_new_findings_without_a_text_encoder_are_refused(text_folder):
    classifier, _ = trained_with(text_folder)
    with pytest.raises(ValueError, match=r"Cyst, Mass: no finding of ct_rate_18, .*name it with --text_model"):
        run(classifier, FindingSelection(classifier, "ct_rate_18", PROMPTS))


@pytest.mark.parametrize(
    ("label_set", "name", "of"),
    [
        ("ct_rate_18", "Lung nodule", "ct_rate_18"),
        ("ct_rate_18", "lung nodule", "ct_rate_18"),
        ("vlm3d_18", "Pneumothorax", "vlm3d_18"),
        # it would silently be scored as it was trained, whatever the prompt says
        ("vlm3d_18", "Hiatal hernia", "ct_rate_18"),
    ],
)
def test_a_prompt_for_a_finding_that_is_there_already_is_refused(label_set, name, of):
    with pytest.raises(ValueError, match=f"prompts: {name} is a finding of {of} already; give it another name"):
        FindingSelection(make_classifier(), label_set, {name: "Something else."})


def test_the_text_encoder_pools_as_in_training(text_folder):
    classifier, text_encoder = trained_with(text_folder, "cls")
    with pytest.raises(ValueError, match="mean pooling is not the one that the classifier was trained with"):
        run(classifier, FindingSelection(classifier, "ct_rate_18", PROMPTS, text_folder))
    handler = FindingSelection(classifier, "ct_rate_18", PROMPTS, text_folder, text_pooling="cls")
    run(classifier, handler)
    scored = classifier._scored_text.clone()
    classifier.score_findings(handler.findings, text_encoder)
    assert torch.equal(classifier._scored_text, scored)
