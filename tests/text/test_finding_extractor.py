import pytest

from vlm3d_ext.text.finding_extractor import FindingExtractor, FindingMention
from vlm3d_ext.text.finding_patterns import lexicon_patterns, patterns_of_finding
from vlm3d_ext.text.label_set import Finding, LabelSet, load_label_set
from vlm3d_ext.text.negation_scope import scopes_of_sentence
from vlm3d_ext.text.prompt_label_set import label_set_of_prompts

EVERYTHING = FindingExtractor("ct_rate_18+vlm3d_18")
DERIVED = {"lung_opacity", "calcification", "fibrosis"}


def read(text):
    """{key: status} without the findings that follow from others."""
    return {mention.key: mention.status for mention in EVERYTHING.mentions(text) if mention.key not in DERIVED}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pleural effusion is seen.", {"pleural_effusion": "present"}),
        # scope of a denial that stands before
        ("No pleural effusion or pneumothorax.", {"pleural_effusion": "absent", "pneumothorax": "absent"}),
        (
            "No nodule, mass, or consolidation is seen in the lungs.",
            {"lung_nodule": "absent", "mass": "absent", "consolidation": "absent"},
        ),
        ("Lungs are clear without consolidation or atelectasis.", {"consolidation": "absent", "atelectasis": "absent"}),
        ("The lungs are free of consolidation.", {"consolidation": "absent"}),
        ("Neither consolidation nor pneumothorax is present.", {"consolidation": "absent", "pneumothorax": "absent"}),
        ("There is no evidence of pulmonary edema.", {"pulmonary_edema": "absent"}),
        ("The coronary arteries show no wall calcification.", {"coronary_artery_wall_calcification": "absent"}),
        # scope of a denial that stands behind
        ("Pericardial effusion-thickening was not observed.", {"pericardial_effusion": "absent"}),
        ("Pulmonary nodules were not seen.", {"lung_nodule": "absent"}),
        ("Emphysema was not detected.", {"emphysema": "absent"}),
        ("The heart is not enlarged.", {"cardiomegaly": "absent"}),
        ("Pneumothorax: none.", {"pneumothorax": "absent"}),
        # where a scope ends
        ("No mass was detected, but consolidation is seen.", {"mass": "absent", "consolidation": "present"}),
        ("No pleural effusion; mild emphysema.", {"pleural_effusion": "absent", "emphysema": "present"}),
        (
            "There is no pleural effusion and mild atelectasis is seen in the right lower lobe.",
            {"pleural_effusion": "absent", "atelectasis": "present"},
        ),
        (
            "Calcified plaques are seen in the aorta and pericardial effusion was not detected.",
            {"arterial_wall_calcification": "present", "pericardial_effusion": "absent"},
        ),
        (
            "Peribronchial thickening is not seen but bronchiectasis is present.",
            {"peribronchial_thickening": "absent", "bronchiectasis": "present"},
        ),
        # exceptions
        ("No other abnormality apart from atelectasis.", {"atelectasis": "present"}),
        ("No pathology other than emphysema was detected.", {"emphysema": "present"}),
        ("Apart from the described lung nodules, no mass was detected.", {"lung_nodule": "present", "mass": "absent"}),
        # what only looks like a denial
        ("There was no significant change in the size of the nodules.", {"lung_nodule": "present"}),
        ("Nodule in the left lung, which was not observed in the previous examination.", {"lung_nodule": "present"}),
        # doubt
        ("Pneumonia cannot be excluded.", {"pneumonia": "uncertain"}),
        ("Suspicious for pneumonia.", {"pneumonia": "uncertain"}),
        ("Consolidation in the left lower lobe (pneumonia?).", {"consolidation": "present", "pneumonia": "uncertain"}),
        ("A mass suspicious for malignancy is seen in the lung.", {"mass": "present"}),
        ("No suspicious nodule is seen.", {"lung_nodule": "absent"}),
        # what was there before
        ("The previously seen consolidation has resolved.", {"consolidation": "history"}),
        ("The pleural effusion is no longer seen.", {"pleural_effusion": "history"}),
        ("Pleural effusion has completely regressed.", {"pleural_effusion": "history"}),
        (
            "The nodule seen in the previous examination was not detected in this examination.",
            {"lung_nodule": "history"},
        ),
        ("History of pneumonia.", {"pneumonia": "history"}),
        ("Pleural effusion has decreased.", {"pleural_effusion": "present"}),
        # normal organs
        ("Mediastinal main vascular structures, heart contour, size are normal.", {"cardiomegaly": "absent"}),
        ("Heart size normal.", {"cardiomegaly": "absent"}),
        ("Heart size increased.", {"cardiomegaly": "present"}),
        ("Cardiothoracic index slightly increased in favor of the heart.", {"cardiomegaly": "present"}),
        ("Bronchial wall thickness is normal.", {"peribronchial_thickening": "absent"}),
        # sizes
        ("A 34 mm nodule is seen in the right upper lobe.", {"mass": "present"}),
        ("A nodule of 3.5 cm in the right upper lobe.", {"mass": "present"}),
        ("A nodule of 30 mm in the right upper lobe.", {"lung_nodule": "present"}),
        ("A mass of 25x14 mm in the left lung.", {"lung_nodule": "present"}),
        ("A 4.2 cm mass lesion in the left lung.", {"mass": "present"}),
        ("Lymph nodes with a short axis of 12 mm are seen.", {"lymphadenopathy": "present"}),
        ("Lymph nodes measuring 12x4 mm are seen.", {"lymphadenopathy": "absent"}),
        # lymph nodes as CT-RATE's reports have them
        (
            "No enlarged lymph nodes in prevascular, paratracheal or subcarinal pathological dimensions were detected.",
            {"lymphadenopathy": "absent"},
        ),
        ("Lymph nodes not in pathological size and appearance were observed.", {"lymphadenopathy": "absent"}),
        ("Small lymph nodes in the mediastinum, not pathological.", {"lymphadenopathy": "absent"}),
        ("There are millimetric lymph nodes in the mediastinum.", {"lymphadenopathy": "absent"}),
        # other organs and other things of the same name
        ("Nodule in the left adrenal gland.", {}),
        ("Hypodense nodule in the thyroid gland.", {}),
        ("Subcutaneous emphysema.", {}),
        ("Aortic valve calcification.", {}),
        ("Minimal pericardial effusion.", {"pericardial_effusion": "present"}),
        ("Effusion in the pericardial space.", {"pericardial_effusion": "present"}),
        ("Effusion in both hemithoraces.", {"pleural_effusion": "present"}),
        ("Atheroma plaques in the aortic arch.", {"arterial_wall_calcification": "present"}),
        (
            "Calcific plaques in the walls of the aorta and coronary arteries.",
            {"arterial_wall_calcification": "present", "coronary_artery_wall_calcification": "present"},
        ),
        ("Fibroatelectasis sequelae changes in the middle lobe.", {"pulmonary_fibrotic_sequela": "present"}),
    ],
)
def test_what_a_sentence_says(text, expected):
    assert read(text) == expected


def test_a_mention_has_sentence_sides_regions_and_sizes():
    text = "Findings: Heart is normal. A 1.2 cm nodule (8 mm in the previous examination) in the left lower lobe."
    assert FindingExtractor("ct_rate_18").mentions(text)[1] == FindingMention(
        key="lung_nodule",
        status="present",
        sentence="A 1.2 cm nodule (8 mm in the previous examination) in the left lower lobe.",
        sides=("left",),
        regions=("left_lower_lobe",),
        sizes_mm=(12.0,),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pleural effusion.", {"pleural_effusion": set()}),
        ("Pleural effusion on the right.", {"pleural_effusion": {"right"}}),
        ("Bilateral pleural effusion.", {"pleural_effusion": {"left", "right"}}),
        ("14 mm pleural effusion on the right and 8 mm on the left.", {"pleural_effusion": {"left", "right"}}),
        ("Right pleural effusion. Left pleural effusion.", {"pleural_effusion": {"left", "right"}}),
        ("Right pleural effusion. No left pleural effusion.", {"pleural_effusion": {"right"}}),
        (
            "Right pleural effusion with left lower lobe atelectasis.",
            {"pleural_effusion": {"right"}, "atelectasis": {"left"}},
        ),
        (
            "Pleural effusion on the left and adjacent atelectasis.",
            {"pleural_effusion": {"left"}, "atelectasis": {"left"}},
        ),
        (
            "A 5 mm nodule in the right upper lobe and a 40 mm thick left pleural effusion.",
            {"lung_nodule": {"right"}, "pleural_effusion": {"left"}},
        ),
        ("Nodule in the lingula.", {"lung_nodule": {"left"}}),
        ("No pleural effusion on the left.", {}),
        ("Calcified plaques in the left coronary artery.", {"coronary_artery_wall_calcification": set()}),
    ],
)
def test_sides(text, expected):
    assert FindingExtractor("ct_rate_18").sides(text) == {key: frozenset(sides) for key, sides in expected.items()}


def test_labels_follow_the_order_of_the_set_and_what_derives():
    report = "Consolidation in the left lung. Calcified plaques in the coronary arteries. Fibrotic sequela changes."
    for name, expected in (
        (
            "ct_rate_18",
            {
                "Consolidation",
                "Lung opacity",
                "Coronary artery wall calcification",
                "Pulmonary fibrotic sequela",
            },
        ),
        ("vlm3d_18", {"Consolidation", "Calcification", "Fibrosis"}),
    ):
        extractor = FindingExtractor(name)
        labels = extractor.labels(report)
        assert labels.shape == (18,) and extractor.names == load_label_set(name).names
        assert {finding for finding, label in zip(extractor.names, labels, strict=True) if label} == expected


def test_a_finding_reads_the_same_in_every_set():
    report = "Nodule of 40 mm in the left lung. Atelectasis on the right. No pleural effusion."
    both = dict(zip(EVERYTHING.keys, EVERYTHING.labels(report), strict=True))
    for name in ("ct_rate_18", "vlm3d_18"):
        extractor = FindingExtractor(name)
        assert dict(zip(extractor.keys, extractor.labels(report), strict=True)) == {k: both[k] for k in extractor.keys}


@pytest.mark.parametrize("report", ["", "   ", "Not given.", "Clinical information: cough, pleural effusion?"])
def test_nothing_to_read(report):
    assert not EVERYTHING.labels(report).any()
    assert EVERYTHING.mentions(report) == [] and EVERYTHING.sides(report) == {}


def test_only_findings_impression_and_recommendations_are_read():
    report = "Clinical information: Known emphysema. Technique: Catheter in place. Findings: - Impression: Atelectasis."
    assert read(report) == {"atelectasis": "present"}


def test_doubt_counts_as_asked():
    for counts in (True, False):
        extractor = FindingExtractor("vlm3d_18", uncertain_is_present=counts)
        labels = dict(zip(extractor.keys, extractor.labels("Possible pneumonia in the left lung."), strict=True))
        assert labels["pneumonia"] == counts and ("pneumonia" in extractor.sides("Possible pneumonia.")) == counts


def test_the_lexicon_covers_both_sets():
    assert set(EVERYTHING.keys) == set(lexicon_patterns())
    for key, entry in lexicon_patterns().items():
        assert (entry.patterns is None) == (not entry.words) and (entry.patterns or entry.follows_from), key


def test_prompts_of_the_label_sets_are_read_as_they_are_meant():
    label_set = load_label_set("ct_rate_18+vlm3d_18")
    extractor = FindingExtractor(label_set)
    for finding in label_set.findings:
        column = extractor.keys.index(finding.key)
        assert extractor.labels(finding.positive_prompts[0])[column] == 1, finding.positive_prompts[0]
        for prompt in finding.negative_prompts:
            assert extractor.labels(prompt)[column] == 0, prompt


def custom_set(synonyms):
    finding = Finding("Air-filled cyst", "cyst", synonyms, ("A cyst.",), (), ())
    return LabelSet("own", "", (finding, load_label_set("ct_rate_18").finding("emphysema")), {})


def test_a_finding_of_ones_own_is_found_by_name_and_synonyms():
    extractor = FindingExtractor(custom_set(("thin-walled cavity", "lung cyst")))
    for text, expected in (
        ("Air filled cysts on the left.", 1),
        ("A thin walled cavity and a scar.", 1),
        ("No lung cysts.", 0),
        ("Renal cyst.", 0),
    ):
        assert extractor.labels(text).tolist() == [expected, 0], text
    assert extractor.sides("Lung cyst on the left.") == {"cyst": frozenset({"left"})}


def test_an_unknown_finding_needs_synonyms():
    with pytest.raises(ValueError, match=r"'Air-filled cyst': its key 'cyst' .* no synonyms"):
        FindingExtractor(custom_set(()))
    with pytest.raises(ValueError, match="no synonyms"):
        FindingExtractor(label_set_of_prompts({"Cavitation": "A cavity is seen."}))
    prompts = FindingExtractor(label_set_of_prompts({"Pneumothorax": "Free air is seen in the pleural space."}))
    assert prompts.labels("A pneumothorax on the left.").tolist() == [1.0]
    assert patterns_of_finding(prompts.label_set.findings[0]) is lexicon_patterns()["pneumothorax"]


def test_scopes_are_spans_of_the_sentence():
    text = "no mass was detected, but pneumonia cannot be excluded"
    scopes = scopes_of_sentence(text)
    assert [text[slice(*span)] for span in scopes.absent] == [" mass was detected"]
    assert text[slice(*scopes.uncertain[0])].endswith("pneumonia ")
    place = text.index("pneumonia")
    assert scopes.status(place, place + 9) == "uncertain"
    assert scopes_of_sentence("pneumonia").status(0, 9) == "present"
