"""The reward of generated reports: by hand, and whether the known ways of gaming it pay."""

import csv
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vlm3d_ext.metrics import model_based_text_scores
from vlm3d_ext.metrics.report_agreement import finding_f1, side_agreement
from vlm3d_ext.metrics.report_rewards import (
    DEFAULT_PENALTIES,
    DEFAULT_WEIGHTS,
    ReportReward,
    format_score,
)
from vlm3d_ext.text.finding_extractor import FindingExtractor
from vlm3d_ext.text.hashed_ngrams import words_of
from vlm3d_ext.text.label_set import load_label_set
from vlm3d_ext.text.repetition import repeated_ngram_share, repeated_sentence_share
from vlm3d_ext.text.report_sections import sections_from_columns, split_sentences, write_report

REAL_REPORTS = Path(__file__).parents[3] / "shared/data/ctrate/validation_reports_drop_dup_with_volumes.head400.csv"
LABEL_SET = load_label_set("ct_rate_18")
L = LABEL_SET.num_findings
NODULE, EFFUSION = LABEL_SET.keys.index("lung_nodule"), LABEL_SET.keys.index("pleural_effusion")


PROMPTS = [(f.key, prompt.lower().rstrip(".")) for f in LABEL_SET.findings for prompt in f.positive_prompts]


class PromptExtractor:
    """Knows a finding by the sentences of its positive prompts, with or without a side before the stop.

    What is tested here is the reward, not the reading of reports: no rule of language is between text and labels.
    """

    keys = LABEL_SET.keys

    def labels(self, report):
        named = {key for key, _ in sentences_of_prompts(report)}
        return np.array([float(key in named) for key in self.keys])

    def sides(self, report):
        sides: dict[str, frozenset[str]] = {}
        for key, sentence in sentences_of_prompts(report):
            found = {side for side in ("left", "right") if f"on the {side}" in sentence}
            sides[key] = sides.get(key, frozenset()) | found
        return sides


@cache
def sentences_of_prompts(report):
    text = re.sub(r"\b(?:findings|impression):", " ", report, flags=re.IGNORECASE)
    sentences = [sentence.lower().rstrip(".") for sentence in split_sentences(text)]
    return [(key, sentence) for sentence in sentences for key, prompt in PROMPTS if sentence.startswith(prompt)]


def reward(**settings):
    return ReportReward(PromptExtractor(), **settings)  # type: ignore[arg-type]  # it has what the reward calls


def write(labels, rng=None):
    """Return a report in the words of the prompts, a statement on each finding and an impression of what is there."""
    choose = (lambda prompts: prompts[0]) if rng is None else (lambda prompts: str(rng.choice(prompts)))
    pairs = list(zip(LABEL_SET.findings, labels, strict=True))
    findings = [choose(f.positive_prompts if label == 1 else f.negative_prompts) for f, label in pairs]
    impression = [choose(f.positive_prompts) for f, label in pairs if label == 1]
    return f"Findings: {' '.join(findings)} Impression: {' '.join(impression) or 'Normal examination.'}"


def label_vector(*present):
    labels = np.zeros(L)
    labels[[LABEL_SET.keys.index(key) for key in present]] = 1
    return labels


def total(report, reference, labels, *, finished=True, **settings):
    return reward(**settings)([report], [finished], [reference], labels[None]).total.item()


LABELS = label_vector("lung_nodule", "pleural_effusion", "cardiomegaly")
TRUTH = write(LABELS)
NORMAL = write(np.zeros(L))
EVERYTHING = write(np.ones(L))


# parts by hand


@pytest.mark.parametrize(
    ("named", "labels", "expected"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 2 / 4),
        ([1, 1, 1, 0], [1, 0, 0, 0], 2 / 4),
        ([1, 1, 0, 0], [1, math.nan, 1, 0], 2 / 3),
        ([0, 0, 0], [0, 0, 0], 1),
        ([0, 1, 0], [0, 0, 0], 0),
        ([0, 1, 0], [0, math.nan, 0], 1),
        ([0, 0, 0], [0, 1, 0], 0),
    ],
)
def test_finding_f1_by_hand(named, labels, expected):
    assert finding_f1(np.array(named, float), np.array(labels, float)) == pytest.approx(expected)


def test_finding_f1_without_a_known_label():
    assert math.isnan(finding_f1(np.ones(3), np.full(3, math.nan)))


def test_finding_f1_refuses_other_labels():
    with pytest.raises(ValueError, match=r"labels must be 1, 0 or NaN .* got \[0\.0, -1\.0\]"):
        finding_f1(np.zeros(2), np.array([0.0, -1.0]))
    with pytest.raises(ValueError, match=r"labels of a report are \(3,\), expected one for each of \(2,\) findings"):
        finding_f1(np.zeros(2), np.zeros(3))


@pytest.mark.parametrize(
    ("given", "expected", "agreement"),
    [
        ({"a": "left"}, {"a": "left"}, 1),
        ({"a": "left"}, {"a": "right"}, 0),
        ({"a": "left right"}, {"a": "left"}, 1 / 2),
        ({}, {"a": "left"}, 0),
        ({"a": "left", "b": "right"}, {"a": "left", "b": "left", "unnamed": "left"}, 1 / 2),
        ({"a": "left", "b": "right"}, {"a": "left", "b": ""}, 1),
    ],
)
def test_side_agreement_by_hand(given, expected, agreement):
    """Both a and b are named; a finding without a side in the reference, or that only it names, is left out."""
    sides, reference = ({key: frozenset(text.split()) for key, text in each.items()} for each in (given, expected))
    assert side_agreement({"a", "b"}, sides, reference) == pytest.approx(agreement)


def test_side_agreement_without_a_side_to_compare():
    assert math.isnan(side_agreement({"a"}, {"a": frozenset({"left"})}, {"b": frozenset({"left"})}))


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ("Findings: A nodule. Impression: Nodule.", 1),
        ("FINDINGS:\nA nodule.\nIMPRESSION:\nNodule.", 1),
        ("Findings: A nodule.", 0.5),
        ("A nodule. Impression: Nodule.", 0.5),
        ("Findings: . Impression: .", 0),
        ("A nodule.", 0),
        ("", 0),
    ],
)
def test_format_by_hand(report, expected):
    assert format_score(report) == expected


def test_total_by_hand():
    """Two of three findings and a false one; of 18, 7.2 false ones are the full penalty."""
    labels = label_vector("lung_nodule", "pleural_effusion", "cardiomegaly")
    report = "Findings: A lung nodule is present. Emphysema is present. Pleural effusion is present on the left."
    reference = (
        "Findings: A lung nodule is present. The heart is larger than normal. Pleural effusion is present on the "
        "right. Impression: Nodule."
    )
    weights = {"clinical": 4, "laterality": 2, "format": 2}
    result = reward(weights=weights, penalties={"unsupported": 0.9})([report], [True], [reference], labels[None])
    assert result.parts["clinical"].item() == pytest.approx(4 / 6)
    assert result.parts["laterality"].item() == 0
    assert result.parts["format"].item() == 0.5
    assert result.parts["unsupported_penalty"].item() == pytest.approx(1 / 7.2)
    assert result.total.item() == pytest.approx((4 * 4 / 6 + 0 + 2 * 0.5) / 8 * (1 - 0.9 / 7.2))
    assert result.watched["num_positives"].item() == 3
    assert result.watched["num_words"].item() == 16
    assert result.watched["bleu"].item() > 0.3  # not in the reward, but seen
    assert "bleu" not in result.parts


@pytest.mark.parametrize(
    ("num_words", "expected"), [(20, 0), (12, 0), (30, 0), (6, 0.5), (45, 0.5), (60, 1), (90, 1), (3, 0.75)]
)
def test_length_penalty_by_hand(num_words, expected):
    """The reference has 20 words, so that 12 to 30 are free, 0 and 60 are the full penalty."""
    report = " ".join("abcdefghijklmnopqrstuvwxyz"[i % 26] * (1 + i // 26) for i in range(num_words))
    reference = " ".join("abcdefghijklmnopqrst")
    parts = reward()([report], [True], [reference], np.zeros((1, L))).parts
    assert parts["length_penalty"].item() == pytest.approx(expected)


def test_repetition_penalty_by_hand():
    """Five different sentences and five copies of one repeat half; between .2 and .6 that is three quarters."""
    different = ["Aorta wide.", "Heart large.", "Lungs clear.", "Liver smooth.", "Bones intact."]
    report = " ".join(different + different[:1] * 5)
    parts = reward()([report], [True], [report], np.zeros((1, L))).parts
    assert parts["repetition_penalty"].item() == pytest.approx((0.5 - 0.2) / 0.4)
    assert reward()([" ".join(different)], [True], [report], np.zeros((1, L))).parts["repetition_penalty"].item() == 0


# what must not pay


def test_the_truth_earns_everything():
    assert total(TRUTH, TRUTH, LABELS) == pytest.approx(1, abs=1e-6)
    assert total(NORMAL, NORMAL, np.zeros(L)) == pytest.approx(1, abs=1e-6)


def test_naming_everything_or_nothing_does_not_pay():
    """For 200 random cases of 3 or 4 findings, each report in wording of its own: truth > normal > all findings."""
    rng = np.random.default_rng(0)
    cases = []
    for index in range(200):
        labels = np.zeros(L)
        labels[rng.choice(L, 3 + index % 2, replace=False)] = 1
        cases.append((labels, write(labels, rng)))
    labels, references = np.stack([case[0] for case in cases]), [case[1] for case in cases]
    totals = {}
    for name, reports in {
        "truth": [write(row, rng) for row in labels],
        "normal": [write(np.zeros(L), rng) for _ in labels],
        "everything": [write(np.ones(L), rng) for _ in labels],
        "half": [write(rng.permutation(L) < L // 2, rng) for _ in labels],
        "one too many": [write(np.maximum(row, np.arange(L) == row.argmin()), rng) for row in labels],
        "one missing": [write(row * (np.arange(L) != row.argmax()), rng) for row in labels],
    }.items():
        totals[name] = reward()(reports, [True] * len(reports), references, labels).total
    assert (totals["truth"] > totals["one too many"]).all()
    assert (totals["truth"] > totals["one missing"]).all()
    assert (totals["one too many"] > totals["normal"]).all()
    assert (totals["one missing"] > totals["normal"]).all()
    assert (totals["normal"] > totals["everything"]).all()
    # guessing half of the findings is right about two of four now and then, but not on average
    assert totals["half"].mean() < totals["normal"].mean()
    assert (totals["everything"] > 0).all()


def test_nor_does_it_where_the_text_is_read_by_rules():
    rng = np.random.default_rng(1)
    labels = np.stack([rng.permutation(L) < 3 + index % 2 for index in range(40)]).astype(float)
    references = [write(row, rng) for row in labels]
    truth, normal, everything = (
        ReportReward(FindingExtractor(LABEL_SET))([write(row, rng) for row in rows], [True] * 40, references, labels)
        for rows in (labels, np.zeros_like(labels), np.ones_like(labels))
    )
    assert truth.parts["clinical"].mean() > 0.9  # the rules do read the prompts
    assert everything.watched["num_positives"].mean() > 0.9 * L
    assert (truth.total > normal.total).all()
    assert (normal.total > everything.total).all()


def test_listing_every_finding_does_not_pay_in_the_shortest_form_either():
    """A bare list keeps the length of the reference and repeats nothing."""
    names = " ".join(finding.positive_prompts[0] for finding in LABEL_SET.findings)
    listing = f"Findings: {names} Impression: As described."
    assert 0 < total(listing, TRUTH, LABELS) < total(NORMAL, TRUTH, LABELS) < total(TRUTH, TRUTH, LABELS)


def test_without_its_penalty_a_list_of_everything_would_win():
    """What the penalty is for: the F1 of all findings is above that of none."""
    assert total(EVERYTHING, TRUTH, LABELS, penalties={}) > total(NORMAL, TRUTH, LABELS, penalties={})


def test_saying_all_twice_does_not_pay():
    doubled = re.sub(r"([^.:]+\.)", r"\1 \1", TRUTH)
    assert len(words_of(doubled)) > 1.9 * len(words_of(TRUTH))
    assert total(doubled, TRUTH, LABELS) < 0.6 * total(TRUTH, TRUTH, LABELS)
    same_length = {"length_ratio": (0.1, 5.0)}
    assert total(doubled, TRUTH, LABELS, **same_length) < 0.7 * total(TRUTH, TRUTH, LABELS, **same_length)


def test_a_longer_or_shorter_report_of_the_same_findings_earns_less():
    """Their F1 is the same; unlike repetition, what is added here says something new each time."""
    filler = " ".join(
        f"The {part} is of {word} appearance."
        for part in (
            "liver",
            "spleen",
            "pancreas",
            "thyroid",
            "sternum",
            "skin",
            "left kidney",
            "gallbladder",
            "axilla",
        )
        for word in ("smooth", "usual", "regular", "plain")
    )
    long = TRUTH.replace("Impression:", f"{filler} Impression:")
    present = " ".join(f.positive_prompts[0] for f, label in zip(LABEL_SET.findings, LABELS, strict=True) if label)
    short = f"Findings: {present} Impression: {present}"
    settings = {"weights": {"clinical": 1}, "penalties": {"length": 0.5}}
    assert total(TRUTH, TRUTH, LABELS, **settings) == 1
    for report in (long, short):
        result = reward()([report], [True], [TRUTH], LABELS[None])
        assert result.parts["clinical"].item() == 1
        assert result.parts["length_penalty"].item() > 0
        assert total(report, TRUTH, LABELS, **settings) < 1
        assert result.total.item() < total(TRUTH, TRUTH, LABELS)


@pytest.mark.parametrize("report", ["", "  \n", "..."])
def test_an_empty_report_earns_nothing_even_where_nothing_is_to_be_said(report):
    result = reward()([report], [True], [NORMAL], np.zeros((1, L)))
    assert result.total.item() == 0
    assert result.parts["clinical"].item() == 0
    assert result.watched["empty"].item() == 1


def test_an_unfinished_report_earns_nothing():
    result = reward()([TRUTH, TRUTH], [True, False], [TRUTH, TRUTH], np.stack([LABELS, LABELS]))
    assert result.total[0] > 0.99
    assert result.total[1] == 0
    assert result.watched["finished"].tolist() == [1, 0]
    assert result.parts["clinical"].tolist() == [1, 1]


def test_a_missing_impression_costs():
    without = TRUTH[: TRUTH.index("Impression:")]
    result = reward()([TRUTH, without], [True, True], [TRUTH, TRUTH], np.stack([LABELS, LABELS]))
    assert result.parts["format"].tolist() == [1, 0.5]
    assert result.parts["clinical"].tolist() == [1, 1]
    assert result.total[1] < result.total[0]


def test_the_wrong_side_costs_and_so_does_none():
    labels = label_vector("pleural_effusion")
    none = write(labels)
    left, right = (
        none.replace("effusion is present", f"effusion is present on the {side}") for side in ("left", "right")
    )
    result = reward()([left, right, none, NORMAL], [True] * 4, [left] * 4, np.stack([labels] * 4))
    np.testing.assert_equal(result.parts["laterality"], [1, 0, 0, math.nan])
    assert result.num_nan["laterality"] == 1
    assert result.total[0] > max(result.total[1:3])
    assert min(result.total[1:3]) > result.total[3]


# what cannot be computed


def test_an_empty_reference_leaves_the_parts_that_need_it_out():
    result = reward()([TRUTH, TRUTH], [True, True], ["", TRUTH], np.stack([LABELS, LABELS]))
    for name in ("bleu", "rouge_l", "length_penalty"):
        assert np.isnan(result.parts[name]).tolist() == [True, False]
        assert result.num_nan[name] == 1
    assert result.num_nan["laterality"] == 2  # the words of the prompts have no sides
    assert result.num_nan["clinical"] == result.num_nan["format"] == result.num_nan["repetition_penalty"] == 0
    assert result.total[0] == pytest.approx(1)


def test_without_labels_the_other_weights_are_scaled_up():
    weights = {"clinical": 0.6, "laterality": 0.1, "rouge_l": 0.1, "format": 0.2}
    labels = np.stack([np.full(L, math.nan), LABELS])
    without_impression = TRUTH[: TRUTH.index("Impression:")]
    result = reward(weights=weights)([without_impression] * 2, [True] * 2, [TRUTH] * 2, labels)
    rouge = result.parts["rouge_l"][0]
    assert result.num_nan["clinical"] == result.num_nan["unsupported_penalty"] == 1
    assert result.total[0] == pytest.approx((0.1 * rouge + 0.2 * 0.5) / 0.3)
    assert result.total[1] == pytest.approx((0.6 + 0.1 * rouge + 0.2 * 0.5) / 0.9)


def test_a_report_of_which_nothing_is_known_has_no_reward_and_is_named():
    labels = np.stack([LABELS, np.full(L, math.nan), np.full(L, math.nan)])
    result = reward(weights={"clinical": 1, "rouge_l": 0.1})([TRUTH] * 3, [True] * 3, [TRUTH, "", TRUTH], labels)
    assert np.isnan(result.total).tolist() == [False, True, False]
    assert result.without_reward == (1,)
    unfinished = reward(weights={"clinical": 1})([TRUTH], [False], [""], labels[1:2])
    assert unfinished.total.item() == 0
    assert unfinished.without_reward == ()


def test_unknown_findings_are_neither_right_nor_wrong():
    labels = LABELS.copy()
    labels[[NODULE, LABEL_SET.keys.index("emphysema")]] = math.nan
    also_emphysema = write(np.maximum(LABELS, label_vector("emphysema")))
    result = reward()([TRUTH, also_emphysema], [True] * 2, [TRUTH] * 2, np.stack([labels] * 2))
    assert result.parts["clinical"].tolist() == [1, 1]
    assert result.parts["unsupported_penalty"].tolist() == [0, 0]


def test_the_batch_is_watched():
    result = reward()([TRUTH, TRUTH, NORMAL, EVERYTHING], [True] * 4, [TRUTH] * 4, np.stack([LABELS] * 4))
    assert result.watched["num_positives"].tolist() == [3, 3, 0, 18]
    assert result.watched["distinct_share"].tolist() == [0.75] * 4
    assert set(result.parts) == {name for name, weight in DEFAULT_WEIGHTS.items() if weight} | {
        f"{name}_penalty" for name in DEFAULT_PENALTIES
    }
    for values in (result.total, *result.parts.values(), *result.watched.values()):
        assert values.shape == (4,)


# settings


@pytest.mark.parametrize(
    ("weights", "clinical", "lexical"),
    [
        ({"clinical": 0.4, "laterality": 0.05, "rouge_l": 0.1, "format": 0.45}, "0.450", "0.100"),
        ({"clinical": 0.7, "bleu": 0.1, "rouge_l": 0.2}, "0.700", "0.300"),
    ],
)
def test_weights_that_invite_gaming_are_refused(weights, clinical, lexical):
    message = rf"clinical parts .* have {clinical} of the total, .* lexical parts .* {lexical}, .* allow_lexical=True"
    with pytest.raises(ValueError, match=message):
        reward(weights=weights)
    reward(weights=weights, allow_lexical=True)


WITH_BERT_SCORE = {"clinical": 0.6, "bert_score": 0.2, "format": 0.2}


def test_bert_score_that_cannot_run_is_an_error_before_training(monkeypatch):
    reason = "bertscore needs the package bert_score, which is not installed: `pip install bert_score`."
    monkeypatch.setattr(model_based_text_scores, "available_model_based_scores", lambda: {"bertscore": reason})
    with pytest.raises(ValueError, match=r"'bert_score' is 0\.2, but .* `pip install bert_score`\. Or set its weight"):
        reward(weights=WITH_BERT_SCORE)
    reward(weights={"clinical": 1})


def test_bert_score_is_asked_for_the_cases_with_a_reference(monkeypatch):
    asked = []

    def scores_of(names, hypotheses, references):
        asked.append((names, hypotheses, references))
        values = np.array([0.85, -0.1])[: len(references)]
        return {"bertscore": model_based_text_scores.ModelBasedScore({"bertscore_f1": values}, {})}

    monkeypatch.setattr(model_based_text_scores, "available_model_based_scores", lambda: {"bertscore": None})
    monkeypatch.setattr(model_based_text_scores, "model_based_scores", scores_of)
    reports, references = [TRUTH, NORMAL, TRUTH], [TRUTH, "", NORMAL]
    result = reward(weights=WITH_BERT_SCORE)(reports, [True] * 3, references, np.stack([LABELS] * 3))
    assert asked == [(["bertscore"], [TRUTH, TRUTH], [TRUTH, NORMAL])]
    np.testing.assert_equal(result.parts["bert_score"], [0.85, math.nan, 0])
    assert result.num_nan["bert_score"] == 1
    assert result.total[0] == pytest.approx(0.6 + 0.2 * 0.85 + 0.2)


def test_weights_at_the_limits_are_taken():
    reward(weights={"clinical": 0.4, "laterality": 0.1, "bleu": 0.1, "rouge_l": 0.1, "format": 0.3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"clinic": 1}}, r"weights: \['clinic'\] are unknown, expected of \['clinical'"),
        ({"weights": {"clinical": -1}}, r"weights: 'clinical' must be finite, at least 0 .* got -1"),
        ({"weights": {"clinical": math.nan}}, r"got nan"),
        ({"weights": {"clinical": 0}}, r"at least one must be above 0"),
        ({"penalties": {"length": 1.5}}, r"penalties: 'length' must be finite, at least 0 and at most 1, got 1\.5"),
        ({"length_ratio": (1.5, 0.6)}, r"length_ratio must be two rising numbers .* got \[1\.5, 0\.6\]"),
        ({"repetition_share": (0.2, 1.2)}, r"repetition_share must be two rising numbers .* at most 1"),
        ({"unsupported_share": 0}, r"unsupported_share must be in \(0, 1\], got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        reward(**settings)


def test_calls_that_do_not_fit():
    with pytest.raises(ValueError, match="got 2 reports, 1 finished, 2 references and 2 rows of labels"):
        reward()([TRUTH] * 2, [True], [TRUTH] * 2, np.zeros((2, L)))
    with pytest.raises(ValueError, match="at least 1"):
        reward()([], [], [], np.zeros((0, L)))
    with pytest.raises(ValueError, match=r"labels of a report are \(3,\)"):
        reward()([TRUTH], [True], [TRUTH], np.zeros((1, 3)))


# real reports


@pytest.fixture(scope="module")
def real_reports():
    if not REAL_REPORTS.is_file():
        pytest.skip("the sample of CT-RATE is not there")
    with REAL_REPORTS.open(encoding="utf-8") as file:
        rows = [sections_from_columns(row["Findings_EN"], row["Impressions_EN"]) for row in csv.DictReader(file)]
    assert len(rows) == 400
    return [write_report(row) for row in rows]


def test_real_reports_are_not_marked_down_for_repetition(real_reports):
    shares = [max(repeated_ngram_share(report), repeated_sentence_share(report)) for report in real_reports]
    assert 0.15 < max(shares) < 0.2  # where `ReportReward` begins to mark down


def test_real_reports_against_the_generic_normal_one_and_a_list_of_all_findings(real_reports):
    """Labels are what the rules read in the reference: the ground truth of these reports is not in the sample."""
    extractor = FindingExtractor(LABEL_SET)
    labels = np.stack([extractor.labels(report) for report in real_reports[:150]])
    normal = next(report for report, row in zip(real_reports, labels, strict=False) if row.sum() == 0)
    chosen = [index for index, row in enumerate(labels) if 3 <= row.sum() <= 4]
    references, labels = [real_reports[index] for index in chosen], labels[chosen]
    everything = " ".join(finding.positive_prompts[0] for finding in LABEL_SET.findings)
    assert len(references) > 20
    totals = [
        ReportReward(extractor)([text(report) for report in references], [True] * len(labels), references, labels).total
        for text in (
            lambda report: report,
            lambda report: normal,
            lambda report: f"Findings: {everything} Impression: {everything}",
            lambda report: normal.replace("Impression:", f"{everything} Impression:"),
        )
    ]
    truth, normals, listings, normals_and_listings = totals
    assert truth.min() > 0.9
    assert (truth > 3 * normals).all()
    assert (normals > listings).all()
    assert (normals > normals_and_listings).all()
