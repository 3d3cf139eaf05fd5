import json

import pytest

from vlm3d_ext.text.disease_set import DiseaseRecord, load_disease_set
from vlm3d_ext.text.label_set import load_label_set

DRAWN = ("pericardial_effusion", "pleural_effusion", "consolidation", "ground_glass_opacity", "lung_nodule")


def content_of(*keys):
    diseases = [
        {"key": key, "name": key.title(), "challenge_name": key.title(), "description": f"What {key} looks like."}
        for key in keys
    ]
    return {"name": "own", "description": "Ours.", "label_set": "own_labels", "diseases": diseases}


def write(folder, content):
    path = folder / "own.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_set_that_ships_has_the_five_drawn_diseases_as_findings_of_its_label_set():
    shipped = load_disease_set()
    assert shipped.keys == DRAWN and shipped.num_diseases == 5
    labels = load_label_set(shipped.label_set)
    assert [labels.finding(name).key for name in shipped.names] == list(DRAWN)
    # The challenge writes ground glass without a hyphen, the label set with one.
    assert shipped.diseases[3].challenge_name == "Ground glass opacity" and shipped.names[3] == "Ground-glass opacity"
    assert len({disease.description for disease in shipped.diseases}) == 5
    assert load_disease_set(shipped) is shipped and load_disease_set("chest_ct_5") == shipped


def test_channels_and_prompts_follow_the_files_order(tmp_path):
    own = load_disease_set(write(tmp_path, content_of("glioma", "oedema", "necrosis")))
    assert (own.name, own.label_set, own.description) == ("own", "own_labels", "Ours.")
    assert [own.index(key) for key in ("necrosis", "glioma", "oedema")] == [2, 0, 1]
    findings = own.findings()
    assert [finding.key for finding in findings] == ["glioma", "oedema", "necrosis"]
    assert findings[1].positive_prompts == ("What oedema looks like.",) and findings[1].negative_prompts == ()
    with pytest.raises(ValueError, match=r"'gliosis' is none of the set own: \['glioma', 'oedema', 'necrosis'\]"):
        own.index("gliosis")


def test_a_set_that_is_nowhere_is_named_with_those_that_ship():
    with pytest.raises(FileNotFoundError, match=r"'chest_ct_6': no such file.*\['chest_ct_5'\]"):
        load_disease_set("chest_ct_6")


def changed(**values):
    content = content_of("glioma", "oedema")
    content["diseases"][1] |= values
    return content


def without(key):
    content = content_of("glioma", "oedema")
    del content["diseases"][1][key]
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([1, 2], 'expected {"diseases"'),
        ({"name": "own", "label_set": "x"}, 'expected {"diseases"'),
        ({**content_of("a"), "diseases": ["glioma"]}, 'expected {"diseases"'),
        ({**content_of("a"), "label_set": None}, "'label_set' of 'own' is None"),
        (content_of(), "the set has no disease"),
        (without("description"), "'description' of 'oedema' is None"),
        (changed(name=None), "'name' of 'oedema' is None"),
        (changed(challenge_name=3), "'challenge_name' of 'oedema' is 3"),
        (changed(description="  "), "disease 'oedema' has an empty 'description'"),
        (changed(key="Oedema"), "'Oedema' must be snake case"),
        (changed(key="brain oedema"), "'brain oedema' must be snake case"),
        (changed(key="glioma"), "'glioma' is there twice"),
    ],
)
def test_a_defective_set_is_refused_in_one_line_that_names_the_file(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as caught:
        load_disease_set(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text


def test_a_checkpoint_of_other_diseases_or_another_order_is_refused(tmp_path):
    record = DiseaseRecord()
    state = record.state_dict()
    assert json.loads(json.dumps(state)) == state == {"disease_set": "chest_ct_5", "disease_keys": list(DRAWN)}
    record.load_state_dict(state)
    own = DiseaseRecord(write(tmp_path, content_of(*DRAWN[::-1])))
    for foreign in (state, {}):
        with pytest.raises(ValueError, match="choose --disease_set") as caught:
            own.load_state_dict(foreign)
        assert "\n" not in str(caught.value)
