import os
import pickle

import numpy as np
import pytest
from monai.transforms import Compose

from vlm3d_ext.data.kept_files import KeptFiles, ReadsFiles
from vlm3d_ext.data.seeded_dataset import SeededDataset

BYTES = 2**18  # of a file's array: four fill a mebibyte


class _Counting(ReadsFiles):
    """Reads a file's bytes; counts how often."""

    def __init__(self):
        self.read = []

    def __call__(self, path):
        return self.kept_files.read(path, self._arrays)[0]

    def _arrays(self, path):
        self.read.append(os.path.basename(path))
        return (np.fromfile(path, dtype=np.uint8),)


@pytest.fixture
def files(tmp_path):
    for number in range(5):
        np.full(BYTES, number, dtype=np.uint8).tofile(tmp_path / str(number))
    return [str(tmp_path / str(number)) for number in range(5)]


def test_what_fits_is_read_once_and_the_rest_each_time(files):
    step = _Counting()
    step.kept_files = KeptFiles(max_mib=0.75)
    for _ in range(3):
        for number, path in enumerate(files):
            assert step(path).tolist() == [number] * BYTES
    assert step.read == ["0", "1", "2", "3", "4", "3", "4", "3", "4"]
    assert step.kept_files.num_bytes == 3 * BYTES


def test_nothing_is_kept_unless_it_is_asked_for(files):
    step = _Counting()
    step(files[0]), step(files[0])
    assert step.read == ["0", "0"] and ReadsFiles.kept_files.num_bytes == 0


def test_a_changed_file_is_read_again(files):
    step = _Counting()
    step.kept_files = KeptFiles(1)
    step(files[0])
    np.full(7, 9, dtype=np.uint8).tofile(files[0])
    assert step(files[0]).tolist() == [9] * 7 and step.kept_files.num_bytes == 7
    step(files[0])
    assert step.read == ["0", "0"]


def test_what_is_kept_cannot_be_written_to(files):
    step = _Counting()
    step.kept_files = KeptFiles(1)
    step(files[0])
    with pytest.raises(ValueError, match="read-only"):
        step(files[0])[0] = 1


def test_a_file_that_is_gone_or_bad_is_an_error_each_time(files):
    kept = KeptFiles(1)
    step = _Counting()
    step.kept_files = kept
    step(files[1])
    os.remove(files[1])
    with pytest.raises(FileNotFoundError):
        step(files[1])

    def refuses(path):
        raise RuntimeError(f"{path} is bad")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="is bad"):
            kept.read(files[0], refuses)


def test_a_dataset_gives_all_its_readers_one_memory_and_leaves_others_alone(files):
    first, second, other = _Counting(), _Counting(), _Counting()
    dataset = SeededDataset(files, Compose([first]), cache_mib=0.75)
    SeededDataset(files, Compose([first, second]), cache_mib=0.75)
    assert first.kept_files is second.kept_files is not other.kept_files
    for _ in range(2):
        assert [int(dataset[index][0]) for index in range(5)] == list(range(5))
    assert first.read == ["0", "1", "2", "3", "4", "3", "4"]
    SeededDataset(files, other)
    assert other.kept_files is ReadsFiles.kept_files
    alone = SeededDataset(files, other, cache_mib=1)
    assert int(alone[3][0]) == 3 and other.kept_files.num_bytes == BYTES


def test_a_dataset_travels_to_a_worker_process(files):
    dataset = SeededDataset(files, Compose([_Counting()]), cache_mib=1)
    dataset[0]
    assert int(pickle.loads(pickle.dumps(dataset))[4][0]) == 4


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        KeptFiles(-1)
