"""One encoder for all, the single-task networks' own answers, and what is exported."""

import pytest
import torch

from tests.networks.tiny_multitask import DISEASES, FINDINGS, HIDDEN, SIZE, tiny_batch, tiny_multitask, tiny_vision
from tests.tiny_language_model import make_tiny_language_model
from vlm3d_ext.networks.nets import FindingsAndLesions, ScanEvidence, VLM3DMultiTask
from vlm3d_ext.networks.nets.scan_evidence import pool_in_plane
from vlm3d_ext.text.report_prompt import ReportPrompt


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    words = "Findings nodule normal lung effusion [FINDING] Classified detected".split()
    return make_tiny_language_model(tmp_path_factory.mktemp("language_model") / "tiny", max_positions=2048, words=words)


@pytest.fixture(scope="module")
def network(language_model):
    return tiny_multitask(language_model)


@pytest.fixture(scope="module")
def scans():
    return tiny_batch(2)


@pytest.fixture(scope="module")
def output(network, scans):
    with torch.no_grad():
        return network(scans["image"], spacing_mm=scans["spacing_mm"], report=scans["report"])


def test_the_output_has_the_parts_and_shapes_that_are_promised(output):
    classification, generation = output["classification"], output["generation"]
    assert {name: value.shape for name, value in classification.items()} == dict.fromkeys(
        ("logits", "probabilities", "predictions"), (2, FINDINGS)
    )
    assert list(output["localization"]) == [
        "pericardial_effusion", "pleural_effusion", "consolidation", "ground_glass_opacity", "lung_nodule"
    ]  # fmt: skip
    assert all(mask.shape == (2, *SIZE) for mask in output["localization"].values())
    assert {name: tuple(value.shape) for name, value in output["vision_features"].items()} == {
        "global": (2, HIDDEN), "local": (2, 2 * 4 * 4, HIDDEN), "region": (2, 20, HIDDEN),
    }  # fmt: skip
    assert len(generation["generated_text"]) == 2 and generation["loss"] > 0
    assert generation["logits"].shape[:2] == (2, 24) or generation["logits"].shape[1] < 24


def test_it_answers_as_the_single_task_networks_do(network, scans, output):
    vision = tiny_vision()
    with torch.no_grad():
        classified = vision.classifier(scans["image"], spacing_mm=scans["spacing_mm"])
        drawn = vision.localizer(scans["image"], scans["spacing_mm"])
        evidence = vision(scans["image"], None, scans["spacing_mm"])
    torch.testing.assert_close(output["classification"]["probabilities"], classified["probabilities"])
    for key, mask in drawn["masks"].items():
        torch.testing.assert_close(output["localization"][key], mask)
    # and the report is the one that the report generator writes from that evidence and the same prompt
    with torch.no_grad():
        generated = network.report_generation(
            evidence.local_features.flatten(1, 3), evidence.global_features, evidence.region_features,
            output["generation"]["prompt"],
        )  # fmt: skip
    assert generated.texts == output["generation"]["generated_text"]


def test_the_prompt_names_what_the_network_finds(network, output):
    for row, prompt in enumerate(output["generation"]["prompt"]):
        findings = output["evidence"]["findings"][row]
        predicted = output["classification"]["predictions"][row].bool().tolist()
        named = [name for name, of in findings.items() if of["prediction"]]
        assert named == [name for name, present in zip(findings, predicted, strict=True) if present]
        assert named  # or the test shows nothing
        expected, _ = ReportPrompt().of_evidence(findings, [], len, 10_000)
        assert prompt.startswith(expected.split("\n[FINDING]")[0].split("\n")[0])
        assert all(f"{name} (" in prompt for name in named)


def test_loss_and_logits_are_those_of_the_reports(network, scans, output):
    model = network.report_generation.language_model
    token_ids, mask = model.encode_reports(scans["report"])
    features = output["vision_features"]
    local = pool_in_plane(features["local"].unflatten(1, (2, 4, 4)), 2).flatten(1, 3)
    with torch.no_grad():
        prompts = network.report_generation.prompts(
            local, features["global"], features["region"], output["generation"]["prompt"]
        )
        log_probabilities = model.log_probabilities(prompts, token_ids, mask, share_prefix=False)
    expected = (-log_probabilities.sum(-1) / mask.sum(-1)).mean()
    torch.testing.assert_close(output["generation"]["loss"], expected)


def test_guided_classification_uses_the_masks_that_there_are(network, scans):
    has_mask = torch.tensor([True, False])
    arguments = {"anatomical_mask": scans["anatomical_mask"], "spacing_mm": scans["spacing_mm"], "generate": False}
    unguided = torch.tensor([False, False])
    with torch.no_grad():
        both = network(scans["image"], use_anatomical_mask=unguided, has_anatomical_mask=has_mask, **arguments)
        guided = network(scans["image"], use_anatomical_mask=torch.tensor([True, True]), **arguments)
    one, other = both["classification"]["logits"], both["guided_classification"]["logits"]
    torch.testing.assert_close(other[0], guided["classification"]["logits"][0])
    torch.testing.assert_close(other[1], one[1])
    assert (one[0] - other[0]).abs().max() > 1e-4


def test_a_scan_in_a_padded_batch_is_answered_as_alone(network, scans):
    image = torch.zeros(2, 1, 6, 20, 24)
    image[:, :, :4, :16, :16] = scans["image"]
    image[1] = torch.rand(1, 6, 20, 24, generator=torch.Generator().manual_seed(5))
    sizes = torch.tensor([SIZE, (6, 20, 24)])
    with torch.no_grad():
        padded = network(image, spacing_mm=scans["spacing_mm"], valid_size=sizes)
        alone = network(scans["image"][:1], spacing_mm=scans["spacing_mm"][:1])
    torch.testing.assert_close(padded["classification"]["logits"][0], alone["classification"]["logits"][0])
    for key, mask in alone["localization"].items():
        torch.testing.assert_close(padded["localization"][key][0, :4, :16, :16], mask[0], rtol=1e-4, atol=1e-5)
    assert padded["generation"]["generated_text"][0] == alone["generation"]["generated_text"][0]


def test_pooled_features_leave_out_what_only_fills_up(network):
    image = torch.rand(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        tokens = network.encoder.encode_tokens(image, valid_size=torch.tensor([[4, 16, 12]]))
        pooled, mask = network.pooled_local_features(tokens, image)
    local = tokens.local_features.unflatten(1, (2, 4, 4))
    torch.testing.assert_close(pooled.unflatten(1, (2, 2, 2))[0, 1, 0, 1], local[0, 1, 0:2, 2].mean(0))
    assert mask.all()


# --- findings that two heads judge ------------------------------------------------------------------------------------


def test_a_drawn_finding_is_judged_by_both_heads_once_it_is_fused(language_model, scans):
    network = tiny_multitask(language_model)
    names, diseases = network.classification.classifier.label_set.names, network.localization.disease_set.names
    drawn = {names[finding]: diseases[disease] for finding, disease in network.drawn_findings.items()}
    # ground-glass opacity is no finding of this label set
    assert drawn == {name: name for name in diseases if name != "Ground-glass opacity"}
    arguments = {"spacing_mm": scans["spacing_mm"], "generate": False}
    finding = names.index("Consolidation")
    with torch.no_grad():
        before = network(scans["image"], **arguments)
        network.fuse(finding, 0.5, 2.0, -1.0)
        network.classification.classifier.thresholds[finding] = 0.9
        after = network(scans["image"], **arguments)
    peak = before["localization"]["consolidation"].flatten(1).amax(1).logit()
    expected = 0.5 * before["classification"]["logits"][:, finding] + 2.0 * peak - 1.0
    torch.testing.assert_close(after["classification"]["logits"][:, finding], expected)
    torch.testing.assert_close(after["classification"]["probabilities"][:, finding], expected.sigmoid())
    assert torch.equal(after["classification"]["predictions"][:, finding].bool(), expected.sigmoid() >= 0.9)
    others = [index for index in range(FINDINGS) if index != finding]
    for name, value in before["classification"].items():
        assert torch.equal(after["classification"][name][:, others], value[:, others])
    found = [of["Consolidation"]["probability"] for of in after["evidence"]["findings"]]
    assert found == pytest.approx(expected.sigmoid().tolist())

    restored = tiny_multitask(language_model)
    restored.load_state_dict(network.state_dict())
    with torch.no_grad():
        again = restored(scans["image"], **arguments)
        network.forget_fusion()
        forgotten = network(scans["image"], **arguments)
    assert torch.equal(again["classification"]["logits"], after["classification"]["logits"])
    assert torch.equal(forgotten["classification"]["logits"], before["classification"]["logits"])


# --- one encoder ------------------------------------------------------------------------------------------------------


def test_the_state_dict_names_the_encoder_once_and_comes_back(network, language_model):
    state = network.state_dict()
    encoder = [name for name in state if ".encoder." in f".{name}"]
    assert encoder and all(name.startswith("encoder.") for name in encoder)
    assert not any("lm_head" in name or "embed_tokens" in name for name in state)  # no base language model
    other = tiny_multitask(language_model)
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}
    other.load_state_dict(changed, strict=True)
    for part in (other.encoder, other.classification.encoder, other.localization.encoder):
        torch.testing.assert_close(part.norm.weight, state["encoder.norm.weight"] + 1)
    assert other.localization.encoder is other.encoder is other.classification.encoder
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.norm\.weight"):
        other.load_state_dict({name: value for name, value in state.items() if name != "encoder.norm.weight"})


def test_the_parts_take_single_task_weights(network, language_model):
    vision = tiny_vision()
    assert network.classification.state_dict().keys() == vision.classifier.state_dict().keys()
    assert network.localization.state_dict().keys() == vision.localizer.state_dict().keys()


def test_the_given_networks_stay_as_they_are(language_model):
    vision = tiny_vision()
    network = VLM3DMultiTask(vision, tiny_multitask(language_model).report_generation)
    assert vision.encoder is not network.encoder and vision.localizer.encoder is not vision.encoder
    assert not any(parameter.requires_grad for parameter in vision.parameters())


def test_without_a_localizer_it_says_so(network):
    vision = tiny_vision()
    blind = ScanEvidence(vision.encoder, vision.classifier)
    with pytest.raises(ValueError, match="draws lesions, but vision has no localizer"):
        VLM3DMultiTask(blind, network.report_generation)


def test_the_export_gives_the_same_probabilities(network, language_model, scans):
    export = tiny_multitask(language_model, FindingsAndLesions)
    export.load_state_dict(network.state_dict())
    with torch.no_grad():
        findings, lesions = export(scans["image"])
        whole = network(scans["image"], generate=False)
    torch.testing.assert_close(findings, whole["classification"]["probabilities"])
    assert lesions.shape == (2, DISEASES, *SIZE)
    torch.testing.assert_close(lesions, torch.stack(list(whole["localization"].values()), dim=1))
