import logging
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.data.lesion_manifest import lesion_case, write_lesion_manifest
from vlm3d_ext.data.case_manifest import ManifestError
from vlm3d_ext.data.lesion_cases import LesionCases
from vlm3d_ext.text.disease_set import load_disease_set

NAN = float("nan")
PERICARDIAL, PLEURAL, CONSOLIDATION, GROUND_GLASS, NODULE = load_disease_set().keys


def labels_of(tmp_path, *cases, labelled=True):
    """Disease labels of training cases, in the order of the set."""
    found = LesionCases(write_lesion_manifest(tmp_path, labelled, training=cases)).cases("training")
    return [case["disease_labels"] for case in found]


def test_without_a_mask_the_label_says_it_and_lung_opacity_only_one_way(tmp_path):
    found = labels_of(
        tmp_path,
        lesion_case("opaque", labels={"Lung opacity": 1, "Lung nodule": 1}),
        lesion_case("clear", labels={"Lung opacity": 0, "Pleural effusion": None}),
    )
    np.testing.assert_array_equal(found, [[0, 0, 0, NAN, 1], [0, NAN, 0, 0, 0]])


def test_a_mask_says_more_than_a_label(tmp_path):
    found = labels_of(tmp_path, lesion_case("a", [GROUND_GLASS, NODULE], {"Lung opacity": 1}, partial=[NODULE]))
    np.testing.assert_array_equal(found, [[0, 0, 0, 1, 1]])


@pytest.mark.parametrize(("label", "whole", "partial"), [(0, 0, 0), (None, 0, NAN)])
def test_an_empty_mask_says_that_there_is_none_unless_the_annotation_is_partial(tmp_path, label, whole, partial):
    labels = {"Lung nodule": label}
    found = labels_of(
        tmp_path,
        lesion_case("whole", [NODULE], labels, empty=[NODULE]),
        lesion_case("partial", [NODULE], labels, empty=[NODULE], partial=[NODULE]),
    )
    np.testing.assert_array_equal([values[-1] for values in found], [whole, partial])


def test_a_window_without_the_scans_lesion_lacks_it(tmp_path):
    """The label is of the scan; under the depth policy "windows" its lesion may lie in another window."""
    (found,) = labels_of(tmp_path, lesion_case("a_window_0", [NODULE], {"Lung nodule": 1}, empty=[NODULE]))
    assert found[-1] == 0


def test_a_data_set_without_labels_knows_only_its_masks(tmp_path):
    cases = [lesion_case("a", [PLEURAL]), lesion_case("b"), lesion_case("c", [NODULE], empty=[NODULE])]
    expected = [[NAN, 1, NAN, NAN, NAN], [NAN] * 5, [NAN, NAN, NAN, NAN, 0]]
    np.testing.assert_array_equal(labels_of(tmp_path, *cases, labelled=False), expected)
    named = [{**case, "labels": []} for case in cases]  # names of labels, but none for the cases
    np.testing.assert_array_equal(labels_of(tmp_path / "named", *named), expected)


def test_a_disease_that_its_label_set_does_not_know_is_refused(tmp_path):
    """Its label would be unknown for ever, without a word."""
    shipped = load_disease_set()
    misspelt = replace(shipped, diseases=(*shipped.diseases[:4], replace(shipped.diseases[4], name="Lung nodules")))
    manifest = write_lesion_manifest(tmp_path, training=[lesion_case("a", labels={})])
    with pytest.raises(ValueError, match=r"disease set chest_ct_5: 'Lung nodules' is no finding of .* vlm3d_18"):
        LesionCases(manifest, misspelt)
    unlabelled = write_lesion_manifest(tmp_path / "unlabelled", False, training=[lesion_case("a", [NODULE])])
    assert LesionCases(unlabelled, misspelt).cases("training")[0]["disease_labels"][4] == 1


def test_splits_and_their_limits(tmp_path):
    manifest = write_lesion_manifest(
        tmp_path, training=[lesion_case(f"t{n}", labels={}) for n in range(3)], test=[lesion_case("e0", labels={})]
    )
    cases = LesionCases(manifest)
    assert [c["volume_id"] for c in cases.cases(["test", "training"], 3)] == ["e0", "t0", "t1"]
    with pytest.raises(ManifestError, match=r"manifest\.json: no split 'valid'"):
        cases.cases("valid")
    with pytest.raises(ManifestError, match=r"manifest\.json: no case in validation"):
        cases.cases("validation")


def test_what_is_there_is_logged(tmp_path, caplog):
    training = [
        lesion_case("a", [NODULE], {}),
        lesion_case("b", [NODULE], {"Lung nodule": 1}, partial=[NODULE]),
        lesion_case("c", [NODULE], {}, empty=[NODULE], partial=[NODULE]),
        lesion_case("d", labels={"Lung nodule": 1}),
    ]
    with caplog.at_level(logging.INFO):
        cases = LesionCases(write_lesion_manifest(tmp_path, training=training, test=[lesion_case("e", labels={})]))
    line = next(line for line in cases.description.splitlines() if "Lung nodule" in line)
    assert "training 2 with mask (1 partial), 1 without lesion, 1 unknown" in line
    assert "validation 0 with mask, 0 without lesion, 0 unknown; test 0 with mask, 1 without lesion" in line
    assert cases.description in caplog.text


def imbalanced(tmp_path):
    """Thirty nodules, four effusions of which two with a nodule, one consolidation; nine scans without lesions."""
    nodules = [lesion_case(f"n{n}", [NODULE], {}) for n in range(28)]
    both = [lesion_case(f"b{n}", [NODULE, PLEURAL], {}) for n in range(2)]
    effusions = [lesion_case(f"e{n}", [PLEURAL], {}) for n in range(2)]
    rare = [lesion_case("c0", [CONSOLIDATION, NODULE], {}, empty=[NODULE])]
    empty = [lesion_case(f"x{n}", [NODULE, PERICARDIAL], {}, empty=[NODULE, PERICARDIAL]) for n in range(4)]
    free = [lesion_case(f"f{n}", labels={}) for n in range(5)]
    unknown = [lesion_case("u0", labels=dict.fromkeys(LABELS))]
    cases = [*nodules, *both, *effusions, *rare, *empty, *free, *unknown]
    return LesionCases(write_lesion_manifest(tmp_path, training=cases))


LABELS = ("Pericardial effusion", "Pleural effusion", "Consolidation", "Lung opacity", "Lung nodule")


def test_diseases_come_up_equally_often_and_cases_take_turns(tmp_path):
    drawn = imbalanced(tmp_path).balanced("training", negative_share=0.25)
    assert Counter(case["crop_disease"] for case in drawn) == {NODULE: 30, PLEURAL: 30, CONSOLIDATION: 30, None: 30}
    for disease, times in ((NODULE, {1}), (PLEURAL, {7, 8}), (CONSOLIDATION, {30})):
        turns = Counter(case["volume_id"] for case in drawn if case["crop_disease"] == disease)
        assert set(turns.values()) == times, disease
    negatives = Counter(case["volume_id"] for case in drawn if case["crop_disease"] is None)
    assert set(negatives) == {*(f"x{n}" for n in range(4)), *(f"f{n}" for n in range(5))}
    assert set(negatives.values()) <= {3, 4}


def test_no_crop_is_asked_of_a_mask_without_a_lesion(tmp_path):
    cases = imbalanced(tmp_path)
    for seed in range(5):
        for case in cases.balanced("training", 3, seed=seed):
            disease = case["crop_disease"]
            assert disease is None or (disease in case["lesion_masks"] and disease not in case["lesion_masks_empty"])


@pytest.mark.parametrize(("samples", "share"), [(7, 0.0), (7, 0.3), (40, 0.5)])
def test_numbers_and_shares_are_those_asked_for(tmp_path, samples, share):
    drawn = imbalanced(tmp_path).balanced("training", samples, share)
    named = Counter(case["crop_disease"] for case in drawn)
    negatives = named.pop(None, 0)
    assert set(named.values()) == {samples} and len(named) == 3
    assert negatives == pytest.approx(share * len(drawn), abs=1)


def test_the_seed_decides_who_takes_turns(tmp_path):
    cases = imbalanced(tmp_path)
    first, again, other = ([c["volume_id"] for c in cases.balanced("training", 3, seed=s)] for s in (1, 1, 2))
    assert first == again != other


def test_a_split_without_a_lesion_has_nothing_to_balance(tmp_path):
    cases = [lesion_case("a", labels={}), lesion_case("b", [NODULE], {}, empty=[NODULE])]
    found = LesionCases(write_lesion_manifest(tmp_path, training=cases))
    with pytest.raises(ManifestError, match=r"manifest\.json: no training case has a mask with a lesion") as caught:
        found.balanced("training")
    assert "--lesion-masks" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_share": 1.0}, "negative_share must be at least 0 and below 1, got 1.0"),
        ({"negative_share": -0.1}, "got -0.1"),
        ({"samples_per_disease": 0}, "samples_per_disease must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        imbalanced(tmp_path).balanced("training", **options)
