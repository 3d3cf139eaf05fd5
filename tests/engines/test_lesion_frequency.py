import numpy as np
import pytest

from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import write_mask_nifti
from vlm3d_ext.engines.lesion_frequency import lesion_frequency
from vlm3d_ext.text.disease_set import load_disease_set

SIZE = (2, 3, 4)
DISEASES = load_disease_set()
NODULE, EFFUSION = DISEASES.index("lung_nodule"), DISEASES.index("pleural_effusion")


def case_of(folder, number, size=SIZE, partial=(), **voxels):
    """A case with masks: disease -> voxels that are lesion."""
    paths = {}
    for key, drawn in voxels.items():
        mask = np.zeros(size, dtype=np.uint8)
        for voxel in drawn:
            mask[voxel] = 1
        paths[key] = str(folder / key / f"{number}.nii.gz")
        write_mask_nifti(paths[key], mask, VolumeGeometry.from_spacing(size, (5.0, 2.0, 2.0), (0.0, 0.0, 0.0)))
    return {"lesion_masks": paths, "lesion_masks_partial": list(partial)}


A, B, C = (0, 0, 0), (1, 2, 3), (0, 1, 2)


def test_frequencies_and_cuts_by_hand(tmp_path):
    """Four nodules: A in all, B in one, C in two. Drawing A and C fits best: (2/3 + 1 + 4/5 + 2/3) / 4 = 0.783,
    A alone gives (1 + 2/3 + 1/2 + 1) / 4 = 0.792."""
    cases = [
        case_of(tmp_path, 0, lung_nodule=[A]),
        case_of(tmp_path, 1, lung_nodule=[A, C], pleural_effusion=[B, C]),
        case_of(tmp_path, 2, lung_nodule=[A, B, C]),
        case_of(tmp_path, 3, lung_nodule=[A]),
        case_of(tmp_path, 4),
    ]
    found = lesion_frequency(cases)
    expected = np.zeros((5, *SIZE), dtype=np.float32)
    expected[NODULE][A], expected[NODULE][B], expected[NODULE][C] = 1.0, 0.25, 0.5
    expected[EFFUSION][B] = expected[EFFUSION][C] = 1.0
    np.testing.assert_array_equal(found.frequency, expected)
    assert found.frequency.dtype == np.float32
    assert 0.5 < found.thresholds[NODULE] <= 1  # A alone
    # With one more of the second kind, A and C win: 0.827 against 0.767.
    again = lesion_frequency([*cases, case_of(tmp_path, 5, lung_nodule=[A, C])])
    assert 0.2 < again.thresholds[NODULE] <= 0.6
    # Diseases that no case has are never drawn, at a threshold that the evaluation takes.
    absent = [index for index in range(5) if index not in (NODULE, EFFUSION)]
    assert found.thresholds[absent].tolist() == [1, 1, 1] and ((0 < found.thresholds) & (found.thresholds <= 1)).all()


def test_the_cut_is_the_best_of_a_plain_loop(tmp_path):
    random = np.random.default_rng(0)
    drawn = [[v for v in np.ndindex(SIZE) if random.random() < 0.2 + 0.5 * (v[2] > 1)] for _ in range(7)]
    found = lesion_frequency([case_of(tmp_path, n, lung_nodule=voxels) for n, voxels in enumerate(drawn)])

    def mean_dice(cut):
        shown = {v for v in np.ndindex(SIZE) if found.frequency[NODULE][v] >= cut}
        return np.mean([2 * len(shown & set(voxels)) / (len(shown) + len(voxels)) for voxels in drawn])

    scores = [mean_dice(cut) for cut in np.linspace(0.049, 0.949, 19)]
    assert mean_dice(found.thresholds[NODULE]) == pytest.approx(max(scores)) and max(scores) > min(scores) + 0.1


def test_empty_and_partial_masks_say_nothing_of_where_lesions_lie(tmp_path):
    whole = case_of(tmp_path, 0, lung_nodule=[A])
    empty, listed = case_of(tmp_path, 1, lung_nodule=[]), case_of(tmp_path, 2, lung_nodule=[])
    listed["lesion_masks_empty"] = ["lung_nodule"]
    partial = case_of(tmp_path, 3, lung_nodule=[B], partial=["lung_nodule"])
    found = lesion_frequency([whole, empty, listed, partial])
    alone = lesion_frequency([whole])
    np.testing.assert_array_equal(found.frequency, alone.frequency)
    assert found.thresholds.tolist() == alone.thresholds.tolist() and alone.frequency[NODULE][A] == 1


@pytest.mark.parametrize("num_masks", [2, 3, 7, 10, 20, 200])
def test_no_share_of_scans_lies_on_a_cut(tmp_path, num_masks):
    """Every cut that can be chosen is further from every share of the scans than rounding reaches."""
    shares = np.arange(num_masks + 1) / num_masks
    case = case_of(tmp_path, 0, lung_nodule=[A])
    cut = lesion_frequency([case]).thresholds[NODULE]
    cuts = cut + 0.05 * np.arange(19)  # the first of the cuts: each fits a single mask
    assert np.abs(cuts[:, None] - shares).min() > 1e-4 and cuts[-1] < 1


def test_grids_of_different_sizes_have_no_voxels_in_common(tmp_path):
    cases = [case_of(tmp_path, 0, lung_nodule=[A]), case_of(tmp_path, 1, (2, 3, 5), pleural_effusion=[A])]
    assert lesion_frequency(cases) == (None, None)
    assert lesion_frequency([case_of(tmp_path, 2)]) == (None, None) == lesion_frequency([])


def test_many_masks_are_thinned_evenly(tmp_path):
    """Of nine masks three: the first, the middle and the last."""
    voxels = list(np.ndindex(SIZE))
    cases = [case_of(tmp_path, number, lung_nodule=[voxels[number]]) for number in range(9)]
    found = lesion_frequency(cases, max_masks=3).frequency[NODULE]
    assert [n for n, voxel in enumerate(voxels) if found[voxel]] == [0, 4, 8]
    assert found.sum() == pytest.approx(1)
    assert (lesion_frequency(cases, max_masks=50).frequency[NODULE] > 0).sum() == 9


def test_a_damaged_mask_is_named(tmp_path):
    case = case_of(tmp_path, 0, lung_nodule=[A])
    (tmp_path / "lung_nodule" / "0.nii.gz").write_bytes(b"a mask")
    with pytest.raises(UnusableScanError, match=r"lung_nodule/0\.nii\.gz: ") as caught:
        lesion_frequency([case])
    assert "\n" not in str(caught.value)
