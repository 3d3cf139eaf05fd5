import pytest

from vlm3d_ext.text.label_mapping import map_labels
from vlm3d_ext.text.prompt_label_set import label_set_of_prompts


def test_one_sentence_several_or_all_parts():
    label_set = label_set_of_prompts(
        {
            "Cavitation": "A cavitary lesion is seen in the lung.",
            "Tree-in-bud  pattern": [" Tree-in-bud nodules. ", "Tree-in-bud opacities."],
            "Hepatic cyst": {"positive": "A cyst.", "negative": ["No cyst."], "regions": ["upper_abdomen"]},
        }
    )
    assert label_set.name == "prompts"
    assert label_set.names == ("Cavitation", "Tree-in-bud  pattern", "Hepatic cyst")
    assert label_set.keys == ("cavitation", "tree_in_bud_pattern", "hepatic_cyst")
    cavitation, tree, cyst = label_set.findings
    assert cavitation.positive_prompts == ("A cavitary lesion is seen in the lung.",)
    assert cavitation.negative_prompts == () and cavitation.regions == ()
    assert tree.positive_prompts == ("Tree-in-bud nodules.", "Tree-in-bud opacities.")
    assert (cyst.positive_prompts, cyst.negative_prompts, cyst.regions) == (
        ("A cyst.",),
        ("No cyst.",),
        ("upper_abdomen",),
    )


def test_a_prompted_finding_that_a_set_labels_can_be_scored_on_its_labels():
    label_set = label_set_of_prompts({"Lung nodule": "A nodule.", "Cavitation": "A cavity."})
    assert map_labels({"Lung nodule": 1}, "ct_rate_18", label_set) == {"Lung nodule": 1, "Cavitation": None}


@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        ({}, "must be a dictionary"),
        ("A cyst.", "must be a dictionary"),
        ({" - ": "A cyst."}, "no name of a finding"),
        ({"Cyst": "  "}, "'positive' of 'Cyst' is '  '"),
        ({"Cyst": ["A cyst.", ""]}, "a text that is not empty"),
        ({"Cyst": []}, "'positive' of 'Cyst' is empty"),
        ({"Cyst": 3}, "'positive' of 'Cyst' is 3"),
        ({"Cyst": {"negative": "No cyst."}}, r"has \['negative'\], expected 'positive'"),
        ({"Cyst": {"positive": "A cyst.", "region": "heart"}}, r"has \['positive', 'region'\]"),
        ({"Cyst": {"positive": "A cyst.", "regions": ["right lower lobes"]}}, "did you mean 'right_lower_lobe'"),
        ({"Cyst": {"positive": "A cyst.", "regions": ["brain_stem_xyz"]}}, "the regions are"),
        ({"Lung cyst": "A cyst.", "lung-cyst": "A cyst."}, "'Lung cyst' and 'lung-cyst' are both the key 'lung_cyst'"),
    ],
)
def test_prompts_that_are_none(prompts, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        label_set_of_prompts(prompts)
    assert "\n" not in str(caught.value)
