import pytest

from data_prep.lesion_masks import DRAWN_DISEASES, LesionMask, find_lesion_masks, flat_mask_parts
from data_prep.raw_case import RawCase
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.text.disease_set import load_disease_set


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def case_of(path):
    return RawCase("s1", "s1", "s1", "test", path, path.name)


def test_diseases_are_those_of_the_disease_set():
    assert DRAWN_DISEASES == load_disease_set("chest_ct_5").keys and len(DRAWN_DISEASES) == 5


def test_both_forms_are_found(tmp_path):
    nodule = touch(tmp_path / "lung_nodule" / "s1.nii.gz")
    effusion = touch(tmp_path / "s1_pleural_effusion_mask.nii.gz")
    nested = touch(tmp_path / "consolidation" / "train_fixed" / "s2.nii")
    touch(tmp_path / "lung_nodule" / "notes.txt")

    index = find_lesion_masks(tmp_path)

    # The order is that of the diseases, whatever the folder says.
    assert list(index.masks_of(case_of(tmp_path / "s1.nii.gz")).items()) == [
        ("pleural_effusion", LesionMask(effusion)),
        ("lung_nodule", LesionMask(nodule)),
    ]
    assert index.by_volume["s2"] == {"consolidation": (LesionMask(nested),)}
    assert index.remarks == ()


def test_unknown_names_are_listed_with_the_nearest_disease(tmp_path):
    touch(tmp_path / "lung_nodul" / "s1.nii.gz")
    touch(tmp_path / "Ground-glass opacity" / "s1.nii.gz")
    touch(tmp_path / "s1_pleural_efusion_mask.nii.gz")
    touch(tmp_path / "fracture" / "s1.nii.gz")

    index = find_lesion_masks(tmp_path)

    assert not index.by_volume
    (remark,) = index.remarks
    assert remark.startswith("lesion masks: 4 name(s)")
    assert "'lung_nodul' (nearest: 'lung_nodule')" in remark
    assert "'Ground-glass opacity' (nearest: 'ground_glass_opacity')" in remark
    assert "'s1_pleural_efusion_mask.nii.gz' (nearest: 'pleural_effusion')" in remark
    assert "'fracture'," in remark, "nothing is near it"


def test_two_masks_of_one_disease_are_refused(tmp_path):
    touch(tmp_path / "lung_nodule" / "s1.nii.gz")
    touch(tmp_path / "s1_lung_nodule_mask.nii.gz")

    with pytest.raises(UnusableScanError, match="two lung_nodule masks of s1"):
        find_lesion_masks(tmp_path).masks_of(case_of(tmp_path / "s1.nii.gz"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("train_1_a_1_lung_nodule_mask.nii.gz", ("train_1_a_1", "lung_nodule")),
        ("x_consolidation_mask.nii", ("x", "consolidation")),
        ("_consolidation_mask.nii", None),
        ("x_consolidation.nii.gz", None),
        ("x_fracture_mask.nii.gz", None),
        ("x_consolidation_mask.png", None),
    ],
)
def test_flat_names(name, parts):
    assert flat_mask_parts(name) == parts
