import json
import math

import pytest
import torch

from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.data.anatomical_regions import region_by_name
from vlm3d_ext.networks.blocks.prompted_text_encoder import FindingEmbeddings, PromptedTextEncoder
from vlm3d_ext.networks.heads import MultiLabelClassifier
from vlm3d_ext.networks.layers import FeatureMoments
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.prompt_label_set import label_set_of_prompts

HIDDEN, TEXT_HIDDEN, TOKENS = 12, 16, 21
CT_RATE = load_label_set("ct_rate_18")
SIZES = {
    "hidden_size": HIDDEN,
    "text_hidden_size": TEXT_HIDDEN,
    "projection_dim": 8,
    "num_soft_tokens": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 3,
}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return PromptedTextEncoder(str(make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert")))


@pytest.fixture(scope="module")
def other_text_encoder(tmp_path_factory):
    return PromptedTextEncoder(str(make_tiny_text_model(tmp_path_factory.mktemp("text") / "bert", seed=1)))


def make_classifier(text_encoder=None, seed=0, **options):
    """Return a classifier that looks as if it had been trained: with statistics, text embeddings and calibration."""
    torch.manual_seed(seed)
    classifier = MultiLabelClassifier(**{**SIZES, **options}).eval()
    with torch.no_grad():
        classifier.logit_bias.fill_(-0.7)
    moments = FeatureMoments(classifier.num_tokens, HIDDEN)
    moments.add(torch.randn(40, classifier.num_tokens, HIDDEN) * 3 + 2)
    classifier.whitening.fit(moments)
    num_findings = classifier.label_set.num_findings
    classifier.trained_findings[:] = torch.arange(num_findings) % 5 != 4
    classifier.temperature.fill_(1.7)
    classifier.offsets.copy_(torch.linspace(-1, 2, num_findings))
    classifier.thresholds.copy_(torch.linspace(0.2, 0.8, num_findings))
    if text_encoder is not None:
        classifier.set_text_encoder(text_encoder)
        classifier.cache_text_embeddings(text_encoder)
    return classifier


def make_features(batch=3, tokens=TOKENS, seed=1):
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 3 + 2


# --- the score itself


def test_logits_by_hand():
    """Global features (3, 4) and (0, -2), findings called (1, 0) and (0.6, 0.8): scale 10, bias -1."""
    classifier = MultiLabelClassifier(**{**SIZES, "hidden_size": 2, "projection_dim": 2}, use_region_features=False)
    classifier.eval()
    with torch.no_grad():
        classifier.vision_projector.weight.copy_(torch.eye(2))
        classifier.vision_projector.bias.zero_()
        classifier.logit_bias.fill_(-1)
    features = torch.tensor([[[3.0, 4.0]], [[0.0, -2.0]]])
    output = classifier(features, torch.tensor([[1.0, 0.0], [0.6, 0.8]]).repeat(9, 1))
    expected = torch.tensor([[10 * 0.6 - 1, 10 * 1.0 - 1], [-1.0, 10 * -0.8 - 1]])
    torch.testing.assert_close(output["logits"], expected.repeat(1, 9))


def test_what_is_seen_of_regions_is_added_before_the_cosine():
    classifier, features = make_classifier(), make_features()
    text = torch.nn.functional.normalize(torch.randn(18, 8), dim=-1)
    whitened = classifier.whitening(features)
    seen = classifier.vision_projector(whitened[:, :1]) + classifier.region_attention(
        whitened, text, classifier.attends
    )
    cosine = torch.cosine_similarity(seen, text.expand_as(seen), dim=-1)
    torch.testing.assert_close(classifier(features, text)["logits"], 10 * cosine - 0.7)


def test_probabilities_and_predictions_are_calibrated(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features(20)
    output = classifier(features)
    by_hand = 1 / (1 + torch.exp(-(output["logits"] / 1.7 + torch.linspace(-1, 2, 18))))
    torch.testing.assert_close(output["probabilities"], by_hand)
    assert output["predictions"].dtype == torch.int64
    assert torch.equal(output["predictions"], (output["probabilities"] >= torch.linspace(0.2, 0.8, 18)).long())
    at_half = (output["probabilities"] >= 0.5).long()
    assert not torch.equal(output["predictions"], at_half)  # the thresholds matter


def test_before_calibration_it_is_the_plain_sigmoid():
    torch.manual_seed(0)
    classifier, features = MultiLabelClassifier(**SIZES).eval(), make_features()
    output = classifier(features, torch.nn.functional.normalize(torch.randn(18, 8), dim=-1))
    assert torch.equal(output["probabilities"], output["logits"].sigmoid())
    assert torch.equal(output["predictions"], (output["logits"] >= 0).long())


def test_a_probability_at_its_threshold_is_a_yes():
    classifier = make_classifier()
    classifier.temperature.fill_(1)
    classifier.offsets.zero_()
    with torch.no_grad():
        classifier.logit_bias.zero_()
    classifier.thresholds.fill_(0.5)
    output = classifier(make_features(), torch.zeros(18, 8))
    assert (output["probabilities"] == 0.5).all() and (output["predictions"] == 1).all()


def test_a_finding_sees_the_global_feature_and_its_own_regions(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features()
    before = classifier(features)["logits"]
    for name in ("heart", "right_upper_lobe"):
        token = region_by_name(name).index
        changed = features.clone()
        changed[:, token] += 5
        differs = (classifier(changed)["logits"] != before).any(0)
        assert differs.tolist() == [name in finding.regions for finding in CT_RATE.findings]
    changed = features.clone()
    changed[:, 0] += 5
    assert (classifier(changed)["logits"] != before).any(0).all()


def test_evaluation_draws_nothing_and_training_drops_features(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features()
    assert torch.equal(classifier(features)["logits"], classifier(features)["logits"])
    classifier.train()
    assert not torch.equal(classifier(features)["logits"], classifier(features)["logits"])
    without = make_classifier(text_encoder, dropout=0.0)
    assert torch.equal(without.train()(features)["logits"], without.eval()(features)["logits"])


def test_without_region_features_only_the_global_feature_is_taken(text_encoder):
    classifier, features = make_classifier(text_encoder, use_region_features=False), make_features()
    alone = classifier(features[:, :1])
    for name, value in classifier(features).items():
        assert torch.equal(value, alone[name])


@pytest.mark.parametrize("tokens", [1, 20])
def test_region_features_that_are_absent_are_refused(text_encoder, tokens):
    with pytest.raises(ValueError, match=rf"features must be \(B, 21, 12\), got \(3, {tokens}, 12\)"):
        make_classifier(text_encoder)(make_features(tokens=tokens))


def test_features_of_another_width_are_refused(text_encoder):
    with pytest.raises(ValueError, match=r"features must be \(B, 21, 12\), got \(3, 21, 6\)"):
        make_classifier(text_encoder)(make_features()[..., :6])


def test_under_autocast_whitening_and_cosine_stay_in_float32(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features(8)
    expected = classifier(features)["logits"]
    whitened = []
    classifier.whitening.register_forward_hook(lambda module, inputs, output: whitened.append(output))
    classifier(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = classifier(features)
        live = classifier(features, classifier.embed_own_findings(text_encoder)[0])
    assert torch.equal(whitened[1], whitened[0])
    assert output["logits"].dtype == live["logits"].dtype == output["probabilities"].dtype == torch.float32
    # two roundings to 8 bits of what goes into a cosine of at most 1, times the scale of 10
    torch.testing.assert_close(output["logits"], expected, atol=0.1, rtol=0)


# --- text embeddings


def test_cached_text_embeddings_give_the_logits_of_the_live_text_encoder(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features()
    live = classifier(features, classifier.embed_own_findings(text_encoder)[0])
    for name, value in classifier(features).items():
        assert torch.equal(value, live[name])
    torch.testing.assert_close(classifier.text_embeddings.norm(dim=1), torch.ones(18))
    with torch.no_grad():
        embedded = text_encoder.embed_findings(CT_RATE.findings, classifier.soft_prompts)
    torch.testing.assert_close(classifier.text_centre, embedded.negative.mean(0))


def test_text_embeddings_are_projected_differences_of_unit_length():
    classifier = make_classifier(projection_dim=16)
    with torch.no_grad():
        classifier.text_projector.weight.copy_(torch.eye(16))
        classifier.text_projector.bias.zero_()
    positive, negative = torch.zeros(2, 2, 16)
    positive[0, 0], positive[1, 1], negative[0, 1], negative[1, 0] = 5.0, 7.0, 2.0, 100.0
    given = FindingEmbeddings(positive, negative, torch.tensor([True, False]))
    centre = torch.zeros(16)
    centre[2] = 24.0
    projected = classifier.embed_findings(given, centre)
    first, second = torch.zeros(2, 16)
    first[:2] = torch.tensor([5.0, -2.0]) / math.sqrt(29)
    second[1:3] = torch.tensor([7.0, -24.0]) / 25  # not its meaningless negative, the centre
    torch.testing.assert_close(projected, torch.stack([first, second]))
    # without a centre, the mean of the negative prompts that there are
    assert torch.equal(classifier.embed_findings(given), classifier.embed_findings(given, negative[0]))
    none = FindingEmbeddings(positive, negative, torch.tensor([False, False]))
    assert torch.equal(classifier.embed_findings(none), classifier.embed_findings(none, positive.mean(0)))


def test_without_negative_prompts_only_the_positive_ones_count(text_encoder):
    classifier = make_classifier(text_encoder, use_negative_prompts=False)
    embeddings = text_encoder.embed_findings(CT_RATE.findings, classifier.soft_prompts, use_negative=False)
    centred = classifier.text_projector(embeddings.positive - embeddings.positive.mean(0))
    torch.testing.assert_close(classifier.text_embeddings, torch.nn.functional.normalize(centred, dim=-1))
    assert not torch.allclose(classifier.text_embeddings, make_classifier(text_encoder).text_embeddings)


def test_a_text_encoder_of_another_width_is_refused(text_encoder):
    classifier = make_classifier(text_hidden_size=24)
    message = r"has 16 channels, the classifier was built for 24; set --text_hidden_size 16 and train\."
    for refuse in (classifier.set_text_encoder, classifier.cache_text_embeddings, classifier.embed_own_findings):
        with pytest.raises(ValueError, match=message):
            refuse(text_encoder)
    with pytest.raises(ValueError, match=message):
        classifier.score_findings(label_set_of_prompts({"Cyst": "A cyst is seen."}).findings, text_encoder)


def test_the_text_encoder_is_noted(text_encoder):
    classifier = make_classifier(text_encoder)
    assert bytes(classifier.text_encoder_sha256.tolist()).hex() == text_encoder.embeddings_sha256


def test_the_state_dict_holds_no_text_encoder_and_makes_the_same_classifier(text_encoder, tmp_path):
    classifier, features = make_classifier(text_encoder), make_features()
    own = {"soft_prompts", "log_logit_scale", "logit_bias", "text_embeddings", "text_centre", "text_encoder_sha256"}
    own |= {"trained_findings", "temperature", "offsets", "thresholds", "whitening.mean", "whitening.matrix"}
    own |= {f"{name}.{part}" for name in ("vision_projector", "text_projector") for part in ("weight", "bias")}
    own |= {f"region_attention.{name}.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")}
    own |= {"region_attention.output.weight", "region_attention.token_embedding"}
    assert set(classifier.state_dict()) == own
    classifier.score_findings(CT_RATE.findings[:2])
    assert set(classifier.state_dict()) == own  # what is scored is no part of it
    classifier.score_findings(None)
    torch.save(classifier.state_dict(), tmp_path / "model.pt")
    other = MultiLabelClassifier(**SIZES).eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    for name, value in classifier(features).items():
        assert torch.equal(other(features)[name], value)
    assert other.scored_is_trained == classifier.scored_is_trained


def test_trainable_parameters_at_full_size():
    """About one million: two projectors, the soft prompts, the attention to regions, scale and bias."""
    counts = {name: parameter.numel() for name, parameter in MultiLabelClassifier().named_parameters()}
    assert counts == {
        "soft_prompts": 18 * 8 * 768,
        "log_logit_scale": 1,
        "logit_bias": 1,
        "vision_projector.weight": 768 * 512,
        "vision_projector.bias": 512,
        "text_projector.weight": 768 * 512,
        "text_projector.bias": 512,
        "region_attention.token_embedding": 21 * 768,
        "region_attention.query.weight": 512 * 96,
        "region_attention.query.bias": 96,
        "region_attention.key.weight": 768 * 96,
        "region_attention.key.bias": 96,
        "region_attention.value.weight": 768 * 96,
        "region_attention.value.bias": 96,
        "region_attention.output.weight": 96 * 512,
    }
    assert 0.9e6 < sum(counts.values()) < 1.2e6


# --- which findings are scored


# a matrix product of another shape sums in another order, so that logits may differ in the last bits
ROUNDING = {"atol": 5e-6, "rtol": 0}


def test_a_choice_of_own_findings_gives_their_columns(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features()
    whole, trained = classifier(features), torch.tensor(classifier.scored_is_trained)
    for order in ([17, 3, 0, 8], list(range(18))[::-1]):
        classifier.score_findings([CT_RATE.findings[row] for row in order])  # needs no text encoder
        chosen = classifier(features)
        for name in ("logits", "probabilities"):
            torch.testing.assert_close(chosen[name], whole[name][:, order], **ROUNDING)
        assert torch.equal(chosen["predictions"], whole["predictions"][:, order])
        for name in ("text_embeddings", "attends", "offsets", "thresholds"):
            scored = getattr(classifier, "_scored_" + name.replace("_embeddings", ""))
            assert torch.equal(scored, getattr(classifier, name)[order])
        assert classifier.scored_thresholds is classifier._scored_thresholds
        assert list(classifier.scored_is_trained) == trained[order].tolist()
        assert [finding.name for finding in classifier.scored_findings] == [CT_RATE.names[row] for row in order]
    classifier.score_findings(None)
    for name, value in classifier(features).items():
        assert torch.equal(value, whole[name])
    assert classifier.scored_findings == CT_RATE.findings
    assert classifier.scored_thresholds is classifier.thresholds


def test_scored_is_trained(text_encoder):
    classifier = make_classifier(text_encoder)
    assert list(classifier.scored_is_trained) == [row % 5 != 4 for row in range(18)]
    new = label_set_of_prompts({"Cyst": "A cyst is seen."}).findings
    classifier.score_findings([CT_RATE.findings[4], *new, CT_RATE.findings[3]], text_encoder)
    assert classifier.scored_is_trained == (False, False, True)


def prompt_like(finding, name="Prompted"):
    given = {"positive": finding.positive_prompts, "negative": finding.negative_prompts, "regions": finding.regions}
    return label_set_of_prompts({name: given}).findings[0]


def test_a_prompt_that_says_what_a_trained_finding_says_scores_the_same(text_encoder):
    """With soft prompts that are all alike, what is scored depends on the prompts alone."""
    classifier, features = make_classifier(), make_features()
    with torch.no_grad():
        classifier.soft_prompts.copy_(torch.randn(2, TEXT_HIDDEN).expand_as(classifier.soft_prompts))
    classifier.set_text_encoder(text_encoder)
    classifier.cache_text_embeddings(text_encoder)
    own = classifier(features)["logits"]
    rows = [2, 9, 15]
    classifier.score_findings([prompt_like(CT_RATE.findings[row], f"Prompted {row}") for row in rows], text_encoder)
    torch.testing.assert_close(classifier._scored_text, classifier.text_embeddings[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(classifier(features)["logits"], own[:, rows], atol=1e-4, rtol=0)


def test_a_prompt_gets_the_mean_soft_prompt_of_trained_findings_and_the_mean_offset(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features(30)
    (new,) = label_set_of_prompts({"Cyst": {"positive": "A cyst is seen.", "regions": ["heart"]}}).findings
    classifier.score_findings([CT_RATE.findings[1], new], text_encoder)
    soft = classifier.soft_prompts[classifier.trained_findings].mean(0, keepdim=True)
    embedded = text_encoder.embed_findings([new], soft)
    expected = classifier.embed_findings(embedded, classifier.text_centre)
    assert torch.equal(classifier._scored_text[1:], expected) and not embedded.has_negative.any()
    output = classifier(features)
    by_hand = torch.sigmoid(output["logits"][:, 1] / 1.7 + classifier.offsets.mean())
    torch.testing.assert_close(output["probabilities"][:, 1], by_hand)
    assert torch.equal(output["predictions"][:, 1], (output["probabilities"][:, 1] >= 0.5).long())
    assert classifier.scored_thresholds.tolist() == [classifier.thresholds[1].item(), 0.5]
    changed = features.clone()
    changed[:, region_by_name("left_upper_lobe").index] += 5
    assert torch.equal(classifier(changed)["logits"][:, 1], output["logits"][:, 1])
    changed[:, region_by_name("heart").index] += 5
    assert (classifier(changed)["logits"][:, 1] != output["logits"][:, 1]).all()


def test_a_prompt_without_regions_looks_everywhere(text_encoder):
    classifier, features = make_classifier(text_encoder), make_features()
    classifier.score_findings(label_set_of_prompts({"Cyst": "A cyst is seen."}).findings, text_encoder)
    before = classifier(features)["logits"]
    for token in range(TOKENS):
        changed = features.clone()
        changed[:, token] += 5
        assert (classifier(changed)["logits"] != before).all()


def test_a_trained_finding_looks_where_it_was_trained_to_look(text_encoder, tmp_path):
    """Another label set may place it elsewhere; its column stays what it was."""
    classifier, features = make_classifier(text_encoder), make_features()
    before = classifier(features)["logits"][:, 2]
    item = {"name": "Big heart", "key": "cardiomegaly", "synonyms": [], "regions": ["left_upper_lobe"]}
    item["prompts"] = {"positive": ["The heart is large."], "negative": []}
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"name": "other", "description": "", "findings": [item]}))
    classifier.score_findings(load_label_set(path).findings)
    torch.testing.assert_close(classifier(features)["logits"][:, 0], before, **ROUNDING)
    assert classifier.scored_findings[0].name == "Big heart"


def test_findings_of_another_label_set(text_encoder):
    """Those that both sets have keep their columns, the others need the text encoder."""
    classifier, features = make_classifier(text_encoder), make_features()
    before, findings = classifier(features), load_label_set("vlm3d_18").findings
    with pytest.raises(ValueError, match=r"Pneumothorax.*no finding of ct_rate_18.*name it with --text_model"):
        classifier.score_findings(findings)
    assert torch.equal(classifier(features)["logits"], before["logits"])  # a refusal changes nothing
    classifier.score_findings(findings, text_encoder)
    after = classifier(features)
    shared = [column for column, finding in enumerate(findings) if finding.key in CT_RATE.keys]
    own = [CT_RATE.keys.index(findings[column].key) for column in shared]
    assert 0 < len(shared) < 18
    torch.testing.assert_close(after["probabilities"][:, shared], before["probabilities"][:, own], **ROUNDING)
    assert torch.equal(classifier._scored_text[shared], classifier.text_embeddings[own])


def test_another_text_encoder_is_refused(text_encoder, other_text_encoder):
    classifier = make_classifier(text_encoder)
    new = label_set_of_prompts({"Cyst": "A cyst is seen."}).findings
    message = f"pooling {other_text_encoder.embeddings_sha256[:12]}, expected {text_encoder.embeddings_sha256[:12]}"
    with pytest.raises(ValueError, match=message):
        classifier.score_findings(new, other_text_encoder)
    classifier.score_findings(CT_RATE.findings[:3], other_text_encoder)  # it is not asked
