from pathlib import Path

import pytest

from data_prep.lesion_labels import EMPTY, NEGATIVE, contradiction_remarks, contradictions, disease_labels
from data_prep.raw_case import RawCase
from vlm3d_ext.text.label_set import load_label_set

CT_RATE = load_label_set("ct_rate_18")


def case_of(volume_id, **labels):
    values = tuple(labels.get(name.replace(" ", "_")) for name in CT_RATE.names)
    return RawCase(volume_id, volume_id, volume_id, "training", Path("x"), "x", labels=values)


def test_labels_of_ct_rate_as_diseases():
    cases = [
        case_of("a", Lung_opacity=0, Lung_nodule=1, Pericardial_effusion=0),
        case_of("b", Lung_opacity=1, Consolidation=0, Pleural_effusion=1),
        RawCase("c", "c", "c", "test", Path("x"), "x"),
    ]

    labels = disease_labels(cases, CT_RATE)

    unknown = dict.fromkeys(labels["c"], None)
    assert labels["a"] == {**unknown, "ground_glass_opacity": 0, "lung_nodule": 1, "pericardial_effusion": 0}
    # A positive "Lung opacity" does not say that it is of ground glass.
    assert labels["b"] == {**unknown, "consolidation": 0, "pleural_effusion": 1}
    assert len(unknown) == 5


def test_no_cases_and_the_sets_own_label_set():
    target = load_label_set("vlm3d_18")
    values = tuple(int(name == "Ground-glass opacity") for name in target.names)

    assert disease_labels([], target) == {}
    labels = disease_labels([RawCase("a", "a", "a", "test", Path("x"), "x", labels=values)], target)["a"]
    assert labels["ground_glass_opacity"] == 1 and sum(labels.values()) == 1


@pytest.mark.parametrize(
    ("label", "voxels", "what"),
    [(1, 0, EMPTY), (1, 5, None), (0, 5, NEGATIVE), (0, 0, None), (None, 0, None), (None, 5, None)],
)
def test_contradictions(label, voxels, what):
    found = contradictions({"lung_nodule": label, "consolidation": 1}, {"lung_nodule": voxels})

    assert found == ({"lung_nodule": what} if what else {})


def test_a_long_list_is_cut_in_the_remark():
    remarks = contradiction_remarks({f"v{n:02}": {"lung_nodule": EMPTY} for n in range(25)} | {"w": {}})

    assert remarks == [f"lung_nodule: 25 volume(s) where {EMPTY} ({', '.join(f'v{n:02}' for n in range(20))}, ...)"]
