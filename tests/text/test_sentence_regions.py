import csv
from pathlib import Path

import pytest

from vlm3d_ext.data.anatomical_regions import ANATOMICAL_REGIONS, region_by_name
from vlm3d_ext.text.report_sections import sections_from_columns, split_sentences
from vlm3d_ext.text.sentence_regions import REGION_LEXICON, regions_of_sentence

REAL_REPORTS = Path(__file__).parents[3] / "shared/data/ctrate/validation_reports_drop_dup_with_volumes.head400.csv"
LUL, LLL, RUL, RML, RLL = (
    "left_upper_lobe",
    "left_lower_lobe",
    "right_upper_lobe",
    "right_middle_lobe",
    "right_lower_lobe",
)
BOTH_LUNGS = [LUL, LLL, RUL, RML, RLL]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("A nodule in the left lung lower lobe.", [LLL]),
        ("A nodule in the upper lobe of the right lung.", [RUL]),
        ("Ground glass in the lower lobes of both lungs.", [LLL, RLL]),
        ("Nodules in the upper lobe and lower lobe of the left lung.", [LUL, LLL]),
        ("Bilateral upper-lower lobe bands.", [LUL, LLL, RUL, RLL]),
        ("Consolidation in the right upper, middle and lower lobes.", [RUL, RML, RLL]),
        ("Atelectasis in the middle lobe.", [RML]),
        (
            "Bands in the right lung middle lobe and the inferior lingular segment of the left lung upper lobe.",
            [LUL, RML],
        ),
        ("Sequelae in the lingula.", [LUL]),
        ("Sequelae in the left lung at the posterobasal level.", [LLL]),
        ("Thickening at the apex of the right lung.", [RUL]),
        ("Nodules in the right lung.", [RUL, RML, RLL]),
        ("Nodules in both lungs, the largest in the lower lobe of the right lung.", BOTH_LUNGS),
        ("Emphysematous changes on the left.", [LUL, LLL]),
        ("Emphysematous changes.", BOTH_LUNGS),
        ("When examined in the lung parenchyma window; A nodule in the right upper lobe.", [RUL]),
        ("When examined in the lung parenchyma window; Pleural effusion is seen.", ["pleura"]),
        ("When examined in the lung parenchyma window; Both sides are symmetrical.", BOTH_LUNGS),
        ("Subpleural nodule in the right lower lobe.", [RLL]),
        ("No pleural or pericardial effusion.", ["heart", "pleura"]),
        ("Calcific plaques in the coronary arteries and the thoracic aorta.", ["heart", "aorta"]),
        ("Calcification of the aortic valve.", ["heart"]),
        ("The pulmonary artery is 32 mm wide.", ["pulmonary_vessels"]),
        ("The trachea and both main bronchi are open.", ["trachea"]),
        ("Hiatal hernia.", ["esophagus", "upper_abdomen"]),
        ("Stones in the gallbladder, a cyst at the liver hilus near the stomach cardia.", ["upper_abdomen"]),
        ("Fracture of the right 5th rib.", ["ribs_right"]),
        ("Old fractures of the ribs on the left.", ["ribs_left"]),
        ("Degenerative changes of the thoracic vertebrae.", ["thoracic_spine"]),
        ("A nodule in the right lobe of the thyroid.", ["thyroid"]),
        ("Enlarged nodes in both axillae.", ["shoulder_girdle"]),
        ("Follow-up is recommended.", []),
        ("", []),
    ],
)
def test_regions(sentence, expected):
    assert regions_of_sentence(sentence) == expected


@pytest.mark.parametrize(
    "template", ["A nodule in the {side} upper lobe.", "The {side} lung is small.", "{side} rib fracture."]
)
def test_left_and_right_are_mirror_images(template):
    left, right = (regions_of_sentence(template.format(side=side)) for side in ("left", "right"))
    mirrored = {name.replace("left", "right") for name in left}
    assert left and mirrored == set(right) - {RML}


def test_the_lexicon_knows_every_region_that_has_no_side_and_no_other():
    named = {region for _, regions in REGION_LEXICON for region in regions}
    assert all(region_by_name(name) for name in named)
    assert {region.name for region in ANATOMICAL_REGIONS} - named == set(BOTH_LUNGS)


def test_case_and_spaces_do_not_matter():
    sentence = "a nodule in the  LEFT lung\nlower lobe"
    assert regions_of_sentence(sentence) == regions_of_sentence(sentence.upper()) == [LLL]


@pytest.mark.skipif(not REAL_REPORTS.is_file(), reason="the real CT-RATE reports are not beside the repository")
def test_most_sentences_of_real_reports_name_a_place():
    with REAL_REPORTS.open(newline="", encoding="utf-8") as file:
        reports = [sections_from_columns(row["Findings_EN"], row["Impressions_EN"]) for row in csv.DictReader(file)]
    sentences = [
        s for report in reports for text in (report.findings, report.impression) for s in split_sentences(text)
    ]
    placed = [bool(regions_of_sentence(sentence)) for sentence in sentences]
    assert len(sentences) > 7000 and 0.88 < sum(placed) / len(placed) < 0.95
    middle = [regions_of_sentence(s) for s in sentences if "right lung middle lobe" in s]
    assert len(middle) > 20 and all(RML in regions for regions in middle)
