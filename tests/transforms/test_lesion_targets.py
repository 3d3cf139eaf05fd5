import gzip
from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.data.lesion_manifest import lesion_case, write_lesion_manifest
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.lesion_cases import UNKNOWN, LesionCases
from vlm3d_ext.data.padded_batches import collate_padded
from vlm3d_ext.data.prepared_case import PreparedCaseError, write_prepared_case
from vlm3d_ext.data.scan import UnusableScanError
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.data.volume_geometry import VolumeGeometry
from vlm3d_ext.data.volume_resampling import write_mask_nifti
from vlm3d_ext.text.disease_set import Disease, DiseaseSet, load_disease_set
from vlm3d_ext.transforms import localization_transforms
from vlm3d_ext.transforms.lesion_targets import LoadLesionTargetsd, RandLesionCropsd

NAN = float("nan")
DISEASES = DiseaseSet(
    "tiny", tuple(Disease(key, key.title(), key.title(), f"A {key}.") for key in ("nodule", "effusion")), "vlm3d_18"
)
SIZE, SPACING = (7, 9, 11), (10.0, 2.0, 3.0)
GEOMETRY = VolumeGeometry.from_spacing(SIZE, SPACING, (-10.0, 5.0, 100.0))


def mask_of(*voxels, size=SIZE):
    mask = np.zeros(size, dtype=np.uint8)
    for voxel in voxels:
        mask[voxel] = 1
    return mask


def sample_of(folder, masks, labels=(NAN, NAN), partial=(), geometry=GEOMETRY):
    paths = {}
    for key, mask in masks.items():
        paths[key] = str(folder / f"{key}.nii.gz")
        write_mask_nifti(paths[key], mask, geometry)
    return {
        "image": torch.zeros(1, *SIZE),
        "spacing_mm": torch.tensor(SPACING),
        "lesion_masks": paths,
        "lesion_masks_partial": list(partial),
        "disease_labels": list(labels),
    }


def target_of(sample, **options):
    return LoadLesionTargetsd(DISEASES, **options)(sample)["target"]


@pytest.mark.parametrize(("label", "value"), [(0.0, 0), (1.0, UNKNOWN), (NAN, UNKNOWN)])
@pytest.mark.parametrize("empty", [False, True])
def test_without_a_lesion_drawn_the_label_decides(tmp_path, label, value, empty):
    nodule = mask_of((3, 4, 5), (2, 1, 0))
    masks = {"nodule": nodule, **({"effusion": mask_of()} if empty else {})}
    for partial in ((), ("effusion",)) if empty else ((),):
        target = target_of(sample_of(tmp_path, masks, (1.0, label), partial))
        assert target.dtype == torch.uint8 and target.shape == (2, *SIZE)
        np.testing.assert_array_equal(target[0], nodule)
        assert torch.equal(target[1], torch.full(SIZE, value, dtype=torch.uint8))


def test_what_was_used_is_taken_away_and_the_case_is_left_alone(tmp_path):
    sample = sample_of(tmp_path, {"nodule": mask_of((3, 4, 5))})
    before = dict(sample)
    loaded = LoadLesionTargetsd(DISEASES)(sample)
    assert set(loaded) == {"image", "spacing_mm", "target"} and sample == before
    del sample["lesion_masks_partial"]
    assert torch.equal(target_of(sample), loaded["target"])


@pytest.mark.parametrize("shell_mm", [4.9, 10.0, 15.0, 1000.0])
def test_the_shell_of_a_partial_annotation_is_in_millimetres(tmp_path, shell_mm):
    """One lesion voxel and slices of 10 mm: the distance of every voxel is computed by hand."""
    at = (3, 4, 5)
    target = target_of(sample_of(tmp_path, {"nodule": mask_of(at)}, partial=["nodule"]), partial_shell_mm=shell_mm)[0]
    steps = np.indices(SIZE) - np.reshape(at, (3, 1, 1, 1))
    distance = np.sqrt(((steps * np.reshape(SPACING, (3, 1, 1, 1))) ** 2).sum(0))
    expected = np.where(distance <= shell_mm, 0, UNKNOWN)
    expected[at] = 1
    np.testing.assert_array_equal(target, expected)
    # 10 mm is one slice, or five rows, or three columns.
    assert target[4, 4, 5] == (0 if shell_mm >= 10 else UNKNOWN) and target[3, 4, 6] == 0
    assert (target == UNKNOWN).any() == (shell_mm < 1000)


def test_the_shells_of_several_lesions_join_and_only_partial_diseases_have_one(tmp_path):
    nodule = mask_of((0, 0, 0), (6, 8, 10))
    target = target_of(
        sample_of(tmp_path, {"nodule": nodule, "effusion": nodule}, partial=["nodule"]), partial_shell_mm=5
    )
    assert (target[0] == 1).sum() == 2 and target[0, 0, 2, 0] == 0 and target[0, 6, 6, 10] == 0
    assert target[0, 3, 4, 5] == UNKNOWN
    np.testing.assert_array_equal(target[1], nodule)


def test_a_mask_with_other_axes_is_turned(tmp_path):
    """A mask that somebody stored as RAS, as most programs do."""
    mask = mask_of((1, 2, 3), (5, 0, 10))
    path = tmp_path / "turned.nii.gz"
    image = nib.as_closest_canonical(nib.Nifti1Image(mask.T, GEOMETRY.affine_ras))
    assert not np.array_equal(np.asarray(image.dataobj).T, mask)
    nib.save(image, path)
    sample = {**sample_of(tmp_path, {}), "lesion_masks": {"nodule": str(path)}}
    np.testing.assert_array_equal(target_of(sample)[0], mask)


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "no gzip":
        path.write_bytes(b"a mask")
    elif how == "no NIfTI":
        path.write_bytes(gzip.compress(b"a mask" * 100))
    elif how == "fewer voxels":
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-40]))


@pytest.mark.parametrize("how", ["gone", "cut short", "no gzip", "no NIfTI", "fewer voxels"])
def test_a_damaged_mask_is_named_in_one_line(tmp_path, how):
    sample = sample_of(tmp_path, {"nodule": mask_of((3, 4, 5))})
    damage(tmp_path / "nodule.nii.gz", how)
    with pytest.raises(UnusableScanError, match=r"nodule\.nii\.gz: .*; ") as caught:
        target_of(sample)
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_shape_is_refused_with_both(tmp_path):
    other = VolumeGeometry.from_spacing((7, 9, 12), SPACING, (-10.0, 5.0, 100.0))
    sample = sample_of(tmp_path, {"nodule": np.zeros((7, 9, 12), dtype=np.uint8)}, geometry=other)
    with pytest.raises(PreparedCaseError, match=r"nodule\.nii\.gz: .*\(7, 9, 12\).*\(7, 9, 11\); prepare") as caught:
        target_of(sample)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [2, 255])
def test_other_values_than_0_and_1_are_refused(tmp_path, value):
    """255 in a file would be "unknown" in the target."""
    sample = sample_of(tmp_path, {"nodule": mask_of((3, 4, 5)) * np.uint8(value)})
    with pytest.raises(PreparedCaseError, match=rf"nodule\.nii\.gz: .*up to {value}, expected 0 and 1; prepare"):
        target_of(sample)


def test_fractions_and_negative_values_are_refused(tmp_path):
    for number, value in enumerate((0.5, -1.0)):
        path = tmp_path / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image((mask_of((3, 4, 5)) * np.float32(value)).T, GEOMETRY.affine_ras), path)
        with pytest.raises(UnusableScanError, match=rf"{number}\.nii\.gz: holds"):
            target_of({**sample_of(tmp_path, {}), "lesion_masks": {"nodule": str(path)}})


# crops

PATCH, CROP = (2, 4, 4), (4, 8, 12)
SCAN = (13, 22, 30)  # filled up to 14 x 24 x 32, so that the last patch of each axis is partly unknown


def scan_with(*voxels, disease=0, size=SCAN):
    target = torch.zeros(2, *size, dtype=torch.uint8)
    for voxel in voxels:
        target[(disease, *voxel)] = 1
    image = torch.arange(1, 1 + target[0].numel(), dtype=torch.float32).view(1, *size)
    return {"image": image, "target": target}


def crop(sample, seed, num_crops=2, crop_size=CROP):
    transform = RandLesionCropsd(DISEASES, crop_size, PATCH, num_crops)
    transform.set_random_state(seed)
    return transform(sample)


@pytest.mark.parametrize("voxel", [(0, 0, 0), (12, 21, 29), (6, 11, 15), (3, 7, 11), (4, 8, 12), (12, 0, 15)])
def test_the_wanted_voxel_is_in_every_second_crop_whatever_the_seed(voxel):
    for seed in range(60):
        result = crop({**scan_with(voxel), "crop_disease": "nodule"}, seed, num_crops=3)
        assert "crop_disease" not in result
        assert (result["target"][::2, 0] == 1).flatten(1).sum(1).tolist() == [1, 1]


def test_crops_begin_at_tokens_stay_inside_and_hold_what_lies_there():
    sample = scan_with((5, 11, 17))
    whole = torch.nn.functional.pad(sample["target"], (0, 2, 0, 2, 0, 1), value=UNKNOWN)
    seen = set()
    for seed in range(200):
        result = crop(dict(sample), seed)
        assert result["valid_size"].tolist() == list(SCAN) and result["image"].shape == (1, 14, 24, 32)
        assert torch.equal(result["image"][:, :13, :22, :30], sample["image"])
        assert result["crop_start"].dtype == torch.int64 and result["target"].shape == (2, 2, *CROP)
        for (d, h, w), target in zip(result["crop_start"].tolist(), result["target"], strict=True):
            assert d % 2 == h % 4 == w % 4 == 0
            assert 0 <= d <= 14 - 4 and 0 <= h <= 24 - 8 and 0 <= w <= 32 - 12
            assert torch.equal(target, whole[:, d : d + 4, h : h + 8, w : w + 12])
            seen.add((d, h, w))
    for axis, places in enumerate((6, 5, 6)):
        assert len({start[axis] for start in seen}) == places  # every place comes up


def test_a_lesion_lies_anywhere_in_its_crop_not_in_its_middle():
    starts = Counter()
    for seed in range(400):
        sample = {**scan_with((6, 11, 15)), "crop_disease": "nodule"}
        starts[tuple(crop(sample, seed, num_crops=1)["crop_start"][0].tolist())] += 1
    # Slice 6 lies in crops from 4 and 6 on; row 11 in those from 4 and 8; column 15 in those from 4, 8 and 12.
    assert set(starts) == {(d, h, w) for d in (4, 6) for h in (4, 8) for w in (4, 8, 12)}
    assert min(starts.values()) > 400 / 12 / 2


@pytest.mark.parametrize("size", [(3, 22, 30), (1, 5, 7), (4, 8, 12), (13, 6, 30)])
def test_scans_thinner_than_the_crop_are_filled_up_with_what_is_unknown(size):
    sample = scan_with((0, 0, 0), size=size)
    for seed in range(10):
        result = crop({**sample, "crop_disease": "nodule"}, seed)
        assert result["valid_size"].tolist() == list(size)
        filled = result["image"].shape[1:]
        assert all(n % p == 0 and n >= c for n, p, c in zip(filled, PATCH, CROP, strict=True))
        assert result["image"].count_nonzero() == sample["image"].numel()
        for start, target in zip(result["crop_start"].tolist(), result["target"], strict=True):
            real = np.prod([max(0, min(n - s, c)) for s, n, c in zip(start, size, CROP, strict=True)])
            assert (target[0] != UNKNOWN).sum() == real > 0
        assert (result["target"][0, 0] == 1).sum() == 1


def test_a_wish_that_cannot_be_met_is_passed_over():
    """The lesion was cropped away in the preparation, or the case has none."""
    sample = {**scan_with((6, 11, 15)), "crop_disease": "effusion"}
    assert crop(dict(sample), 0)["target"].shape == (2, 2, *CROP)
    assert not (crop({**scan_with(), "crop_disease": None}, 0)["target"] == 1).any()
    with pytest.raises(ValueError, match="'gout' is none of the set tiny"):
        crop({**scan_with((6, 11, 15)), "crop_disease": "gout"}, 0)


def test_half_of_the_free_crops_hold_a_lesion_beside_those_by_chance():
    """A crop at any of 6 x 5 x 6 places holds the corner with probability 1 / 180: about half are on purpose."""
    held = sum(
        int((crop(scan_with((0, 0, 0)), seed, num_crops=4)["target"][:, 0] == 1).flatten(1).any(1).sum())
        for seed in range(200)
    )
    assert held / 800 == pytest.approx(0.5 + 0.5 / 180, abs=0.06)


def test_crops_of_a_seed_are_the_same_and_those_of_another_are_not():
    sample = scan_with((6, 11, 15))
    first, again, other = (crop(dict(sample), seed, 6)["crop_start"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("crop_size", [(3, 8, 12), (4, 8, 2), (4, 0, 8)])
def test_a_crop_that_is_no_multiple_of_the_patch_is_refused(crop_size):
    with pytest.raises(ValueError, match=r"crop_size must be multiples of the patch \(2, 4, 4\), got"):
        RandLesionCropsd(DISEASES, crop_size, PATCH)


# the whole chain, from a manifest


def prepared_cases(folder):
    """Twelve nodules, two effusions (one with a nodule), two scans without lesions and a thin one; real files."""
    random = np.random.default_rng(0)
    plan = [*[("lung_nodule",)] * 12, ("pleural_effusion",), ("pleural_effusion", "lung_nodule"), (), ()]
    entries = []
    for number, keys in enumerate(plan):
        size = (3, 22, 30) if number == 3 else SCAN
        volume_id = f"train_{number}_a_1"
        geometry = VolumeGeometry.from_spacing(size, (5.0, 2.0, 2.0), (0.0, 0.0, 0.0))
        imgs = random.integers(0, 255, size, dtype=np.uint8)
        write_prepared_case(folder, volume_id, imgs, None, (5.0, 2.0, 2.0), {"volume_id": volume_id})
        for key in keys:
            mask = np.zeros(size, dtype=np.uint8)
            mask[tuple(random.integers(0, n) for n in size)] = 1
            write_mask_nifti(folder / "lesion_masks" / key / f"{volume_id}.nii.gz", mask, geometry)
        entries.append(lesion_case(volume_id, keys, {}))
    return LesionCases(write_lesion_manifest(folder, training=entries))


def test_diseases_share_the_positive_crops_evenly_though_cases_do_not(tmp_path):
    """By chance or as the other lesion of its scan, a disease is in a few more; the others' share stays near it."""
    cases = prepared_cases(tmp_path).balanced("training", negative_share=0.2)
    chain = localization_transforms("chest_ct_5", CROP, PATCH, num_crops=2)
    dataset = SeededDataset(cases, chain, seed=3)
    effusion, nodule = (load_disease_set().index(key) for key in ("pleural_effusion", "lung_nodule"))
    first, every = Counter(), Counter()
    for epoch in range(6):
        for index, case in enumerate(cases):
            target = dataset[EpochIndex(epoch, index)]["target"]
            for name, crops in ((first, target[:1]), (every, target)):
                for held in (crops == 1).flatten(2).any(2):
                    name.update([key for key, channel in (("e", effusion), ("n", nodule)) if held[channel]])
            assert case["crop_disease"] is None or (target[0] == 1).any()
    assert first["e"] >= 13 * 6 and first["n"] >= 13 * 6  # 13 scans with a nodule, so 13 draws of each
    assert every["e"] / every["n"] == pytest.approx(1, abs=0.2)


def test_the_chain_gives_what_training_and_validation_take(tmp_path):
    cases = prepared_cases(tmp_path)
    drawn = [case for case in cases.balanced("training") if case["volume_id"] in ("train_3_a_1", "train_14_a_1")][:2]
    train = SeededDataset(drawn, localization_transforms("chest_ct_5", CROP, PATCH, intensity_augmentation=0.1))
    batch = collate_padded([train[0], train[1]])
    drawn_names = {"crop_start", "intensity_factor", "intensity_offset"}
    assert set(batch) == {"volume_id", "image", "spacing_mm", "target", "valid_size", *drawn_names}
    assert batch["target"].shape == (2, 2, 5, *CROP) and batch["image"].shape == (2, 1, 14, 24, 32)

    whole = localization_transforms("chest_ct_5")
    for case in cases.cases("training"):
        sample = whole(case)
        assert set(sample) == {"volume_id", "image", "spacing_mm", "target"}
        for index, key in enumerate(load_disease_set().keys):
            assert (sample["target"][index] == 1).sum() == (key in case["lesion_masks"])
            assert set(sample["target"][index].unique().tolist()) <= {0, 1}
    unlabelled = [{**case, "labels": []} for case in CaseManifest(tmp_path / "manifest.json").content["training"]]
    again = LesionCases(write_lesion_manifest(tmp_path, False, training=unlabelled)).cases("training")
    target = whole(again[0])["target"]
    nodule = load_disease_set().index("lung_nodule")
    assert (target[nodule] == 1).sum() == 1 and (target[torch.arange(5) != nodule] == UNKNOWN).all()


def test_samples_from_memory_are_those_from_files(tmp_path):
    cases = prepared_cases(tmp_path).balanced("training", samples_per_disease=4)
    chains = [localization_transforms("chest_ct_5", CROP, PATCH, intensity_augmentation=0.1) for _ in range(2)]
    plain, kept = SeededDataset(cases, chains[0]), SeededDataset(cases, chains[1], cache_mib=1)
    expected = [[plain[EpochIndex(epoch, index)] for index in range(len(cases))] for epoch in range(2)]
    for epoch in range(2):
        for index, want in enumerate(expected[epoch]):
            got = kept[EpochIndex(epoch, index)]
            assert got.keys() == want.keys()
            for name, value in want.items():
                assert torch.equal(got[name], value) if torch.is_tensor(value) else got[name] == value, name
    files = kept.transform.transforms[0].kept_files
    masks = {path for case in cases for path in case["lesion_masks"].values()}
    assert set(files._kept) == masks | {case["image"] for case in cases}
    assert 0 < files.num_bytes < len(files._kept) * 25_000
