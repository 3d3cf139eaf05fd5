import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vlm3d_ext.checkpoint_files import file_sha256
from vlm3d_ext.data.case_manifest import with_and_without_mask
from vlm3d_ext.data.feature_store import FeatureStore, FeatureStoreError
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.transforms import LoadFeaturesd

FINGERPRINT = "f" * 64
CASES = [
    {"volume_id": f"train_{number}_a_1", "has_anatomical_mask": number != 2, "labels": [1.0, math.nan, 0.0]}
    for number in range(4)
]


@pytest.fixture
def encoder_ckpt(tmp_path):
    path = tmp_path / "encoder" / "model.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def make_features(folder, encoder_ckpt, value, **changes):
    """Write features whose numbers say of which volume, token and store they are: value + 10 volume + token."""
    origin = {"encoder_sha256": file_sha256(encoder_ckpt), "fingerprint": FINGERPRINT, **changes}
    store = FeatureStore(folder, origin)
    for number, case in enumerate(CASES):
        tokens = value + 100 * number + np.arange(21.0)[:, None] + np.zeros((21, 5))
        store.write(case["volume_id"], tokens[0], tokens[1:], np.full(3, 7.0))
    return folder


@pytest.fixture
def folders(tmp_path, encoder_ckpt):
    return (
        make_features(tmp_path / "guided", encoder_ckpt, 10_000, use_anatomical_mask=True),
        make_features(tmp_path / "unguided", encoder_ckpt, 20_000, use_anatomical_mask=False),
    )


def number_of(sample):
    return sample["features"][0, 0].item()


def test_a_case_as_tensors(folders, encoder_ckpt):
    sample = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, probability=1.0)(CASES[3])
    assert sample["features"].shape == (21, 5) and sample["features"].dtype == torch.float32
    assert sample["features"][:, 2].tolist() == [10_300 + token for token in range(21)]  # the global feature first
    # labels are the case's, which may be of another label set than those of the extraction
    assert sample["labels"].dtype == torch.float32
    torch.testing.assert_close(sample["labels"], torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)
    assert sample["volume_id"] == "train_3_a_1" and sample["use_anatomical_mask"].item() is True


def test_both_folders_are_drawn_from_as_often_as_asked(folders, encoder_ckpt):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1], probability=0.3)
    dataset = SeededDataset(CASES, transform)
    samples = [dataset[EpochIndex(epoch, 1)] for epoch in range(1000)]
    for sample in samples:
        assert number_of(sample) == (10_100 if sample["use_anatomical_mask"] else 20_100)
    guided = sum(sample["use_anatomical_mask"].item() for sample in samples)
    assert abs(guided / 1000 - 0.3) < 0.06  # four standard errors of 0.0145
    again = SeededDataset(CASES, LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1], 0.3))
    assert [number_of(again[EpochIndex(epoch, 1)]) for epoch in range(50)] == [number_of(s) for s in samples[:50]]


@pytest.mark.parametrize(("probability", "number"), [(0.0, 20_100), (1.0, 10_100)])
def test_never_and_always(folders, encoder_ckpt, probability, number):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1], probability)
    assert {number_of(transform(CASES[1])) for _ in range(30)} == {number}


def test_a_case_without_a_mask_always_takes_the_unguided_features(folders, encoder_ckpt):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1], probability=1.0)
    for case in (CASES[2], {**CASES[2], "use_anatomical_mask": True}):
        sample = transform(case)
        assert number_of(sample) == 20_200 and sample["use_anatomical_mask"].item() is False


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_case_that_says_which_gets_it(folders, encoder_ckpt, probability):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1], probability)
    samples = [transform(case) for case in with_and_without_mask(CASES)]
    assert [number_of(sample) for sample in samples] == [20_000, 20_100, 20_200, 20_300, 10_000, 10_100, 10_300]
    assert [sample["use_anatomical_mask"].item() for sample in samples] == [False] * 4 + [True] * 3


def test_one_folder_serves_both_ways(folders, encoder_ckpt):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT)
    assert {number_of(transform(CASES[1])) for _ in range(30)} == {10_100}


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_was_read_is_kept_only_if_asked(folders, encoder_ckpt, in_memory):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, in_memory=in_memory)
    before = transform(CASES[1])["features"].clone()
    (folders[0] / "train_1_a_1.npz").unlink()
    if in_memory:
        assert torch.equal(transform(CASES[1])["features"], before)
    else:
        with pytest.raises(FeatureStoreError, match=r"train_1_a_1\.npz: no readable features"):
            transform(CASES[1])


def test_workers_and_batches(folders, encoder_ckpt):
    dataset = SeededDataset(CASES, LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[1]))
    batches = [next(iter(DataLoader(dataset, 4, num_workers=workers))) for workers in (0, 1)]
    assert torch.equal(batches[0]["features"], batches[1]["features"])
    assert batches[0]["features"].shape == (4, 21, 5) and len(batches[0]["volume_id"]) == 4


def test_an_encoder_that_is_not_there(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist; train the encoder.*--encoder_ckpt PATH"):
        LoadFeaturesd(folders[0], tmp_path / "nothing.pt", FINGERPRINT)


@pytest.mark.parametrize("which", [0, 1])
def test_features_of_another_encoder_are_refused(folders, encoder_ckpt, which, tmp_path):
    chosen = list(folders)
    chosen[which] = make_features(tmp_path / "other", encoder_ckpt, 0, encoder_sha256="b" * 64)
    message = (
        rf"other: the features there are of another encoder than .*model\.pt \(encoder_sha256 {'b' * 12}, expected"
    )
    with pytest.raises(FeatureStoreError, match=message) as caught:
        LoadFeaturesd(chosen[0], encoder_ckpt, FINGERPRINT, chosen[1])
    assert "extract them again" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("which", [0, 1])
def test_features_of_other_data_are_refused(folders, encoder_ckpt, which, tmp_path):
    chosen = list(folders)
    chosen[which] = make_features(tmp_path / "other", encoder_ckpt, 0, fingerprint="e" * 64)
    with pytest.raises(FeatureStoreError, match=r"of other data than this manifest \(fingerprint eeeeeeeeeeee, exp"):
        LoadFeaturesd(chosen[0], encoder_ckpt, FINGERPRINT, chosen[1])


def test_a_folder_that_is_not_there(folders, encoder_ckpt, tmp_path):
    for chosen in ((tmp_path / "missing", folders[1]), (folders[0], tmp_path / "missing")):
        with pytest.raises(FeatureStoreError, match=r"missing/features\.json: no such file; make features first with"):
            LoadFeaturesd(chosen[0], encoder_ckpt, FINGERPRINT, chosen[1])


def test_a_volume_without_features_is_named(folders, encoder_ckpt):
    transform = LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT)
    with pytest.raises(FeatureStoreError, match=r"train_9_a_1\.npz: no readable features .*; extract them again"):
        transform({**CASES[0], "volume_id": "train_9_a_1"})


def test_folders_that_are_not_what_they_are_given_for(folders, encoder_ckpt):
    message = r"unguided: .* use_anatomical_mask False, expected True; point --features_dir"
    with pytest.raises(FeatureStoreError, match=message):
        LoadFeaturesd(folders[1], encoder_ckpt, FINGERPRINT, folders[0])
    with pytest.raises(FeatureStoreError, match=r"guided: .* True, expected False; point --features_without_mask_dir"):
        LoadFeaturesd(folders[0], encoder_ckpt, FINGERPRINT, folders[0])
