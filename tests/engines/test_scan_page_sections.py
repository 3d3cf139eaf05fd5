import html
import re

import pytest

from tests.engines.page_phantom import LINEAGE, finding
from vlm3d_ext.engines.scan_page_sections import findings_html, lesions_html, lineage_html, notes_html, report_html


def place(position_mm, what):
    """Stands in for the scan: the position itself, in the order (k, j, i)."""
    x, y, z = position_mm
    return int(z), int(y), int(x)


def links_of(written):
    return [
        (html.unescape(text), slices)
        for slices, text in re.findall(
            r'<a href="#viewer" class="sentence" data-slices="([\d,]+)"[^>]*>(.*?)</a>', written, re.DOTALL
        )
    ]


def lesion(x, volume_ml=1.0):
    return {"centroid_mm": [x, 2, 3], "bbox_mm": [0, 0, 0, 4, 5.4, 6], "probability": 0.75, "volume_ml": volume_ml}


def mention(key, sentence, status="present", sides=()):
    return {"key": key, "sentence": sentence, "status": status, "sides": list(sides)}


def report(text, *mentions, **metadata):
    return {"volume_id": "v", "sections": {"findings": text}, "findings_list": list(mentions), "metadata": metadata}


NODULE = finding("Lung nodule", 0.9, disease="lung_nodule", position_mm=[1, 2, 3])
EFFUSION = finding("Pleural effusion", 0.8, disease="pleural_effusion", position_mm=[7, 8, 9])
NOWHERE = finding("Emphysema", 0.7)


def test_sentences_of_placed_findings_become_links_whatever_their_spaces():
    text = 'A "nodule"  is\nseen. Emphysema is there. Fluid on the right & left.'
    written = report_html(
        report(
            text,
            mention("lung_nodule", "A nodule is seen."),
            mention("emphysema", "Emphysema is there."),
            mention("pleural_effusion", "Fluid on the right & left."),
        ),
        [NODULE, EFFUSION, NOWHERE],
        {},
        place,
        0.0,
    )
    assert links_of(written) == [('A "nodule"  is\nseen.', "3,2,1"), ("Fluid on the right & left.", "9,8,7")]
    assert html.unescape(re.sub("<[^>]+>", "", written)) == f"Findings\n{text}"


def test_a_side_leads_to_the_lesion_of_that_side():
    lesions = {"pleural_effusion": [lesion(20), lesion(80), lesion(30)]}  # most probable first
    sentences = [("Left fluid.", ["left"]), ("Right fluid.", ["right"]), ("Fluid on both sides.", ["left", "right"])]
    written = report_html(
        report(
            " ".join(s for s, _ in sentences), *(mention("pleural_effusion", s, sides=sides) for s, sides in sentences)
        ),
        [EFFUSION],
        lesions,
        place,
        50.0,
    )
    # Left is where x is large.
    assert [slices for _, slices in links_of(written)] == ["3,2,80", "3,2,20", "9,8,7"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_findings_in_a_sentence_the_affirmed_one_is_shown(order):
    sentence = "A nodule, but no effusion."
    mentions = [mention("lung_nodule", sentence), mention("pleural_effusion", sentence, "absent")]
    written = report_html(report(sentence, *(mentions[n] for n in order)), [NODULE, EFFUSION], {}, place, 0.0)
    assert links_of(written) == [(sentence, "3,2,1")]


def test_what_is_to_be_known_of_a_report_is_said():
    remarks = report_html(
        report("Text.", finished=False, num_lesions_left_out=2, evidence_of="other", notice="Not for use."),
        [],
        {},
        place,
        0,
    )
    for remark in ("cut off at its length limit", "2 lesions did not fit", "the evidence of other", "Not for use."):
        assert remark in remarks
    assert "cut off" not in report_html(report("Text.", finished=True, evidence_of="v"), [], {}, place, 0)
    assert report_html({}, [], {}, place, 0) == '<p class="remark">No report was written.</p>'


def test_a_finding_without_numbers_is_last_and_has_dashes():
    unknown = finding("Mass", 0.2, threshold=None) | {"probability": None, "prediction": 0}
    written = findings_html([unknown, NOWHERE], {}, place)
    assert written.index("Emphysema") < written.index("Mass")
    assert "–<small> / –</small>" in written
    assert findings_html([], {}, place) == '<p class="remark">No findings were computed.</p>'


def test_lesions_are_listed_by_disease_with_their_measures():
    lesions = {"b": [lesion(4, 0.0342), lesion(5, 974.3)], "a": [lesion(6)]}
    written = lesions_html(lesions, {"a": "First", "b": "Second"}, {"a": "#111111", "b": "#222222"}, place)
    rows = [re.sub("<[^>]+>", " ", row).split() for row in re.findall(r"<tr><th scope.*?</tr>", written)]
    box = ["4", "×", "5", "×", "6", "0.75"]
    assert rows == [["First", "1", "1", *box], ["Second", "1", "0.034", *box], ["Second", "2", "974", *box]]
    assert re.findall(r'data-slices="([\d,]+)"', written) == ["3,2,6", "3,2,4", "3,2,5"]
    assert lesions_html({}, {"a": "First"}, {"a": "#111111"}, place) == '<p class="remark">No lesion was drawn.</p>'


def test_the_origin_goes_down_to_the_data_and_shows_no_folder():
    written = lineage_html(LINEAGE, "c" * 64)
    order = [
        "multitask 0.4.0",
        "c" * 64,
        "localization 0.3.0",
        "localization.pt",
        "l" * 64,
        "encoder 0.2.0",
        "encoder.pt",
    ]
    order += ["e" * 64, "text: none, from random weights", "data manifest", "manifest.json", "m" * 64, "abc"]
    places = [written.index(text) for text in order]
    assert places == sorted(places)
    assert "someone" not in written and "torch 2.11.0" in written


def test_an_upstream_without_lineage_says_so():
    written = lineage_html(
        {"bundle": "b", "upstream": {"encoder": {"path": "e.pt", "sha256": None, "lineage": None}}}, ""
    )
    assert "encoder: <strong>no lineage</strong>" in written and "not known" in written


def test_no_notes_leave_no_box():
    assert notes_html([]) == ""
    assert "<li>a &lt;b&gt;</li>" in notes_html(["a <b>"])
