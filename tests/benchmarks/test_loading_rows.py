import numpy as np
import pytest

from benchmarks import loading_rows, volumes
from benchmarks.row import ResultsDiffer
from vlm3d_ext.data.prepared_case import write_prepared_case

SIZE = (8, 32, 32)


@pytest.fixture
def small_volumes(monkeypatch):
    """Prepared volumes of a few voxels in the place of a whole CT."""

    def prepared(folder, volume_format, number, window="soft_tissue", size=SIZE):
        cases = []
        for index in range(number):
            imgs = np.random.default_rng(index).integers(0, 4, SIZE, dtype=np.uint8)
            path, _ = write_prepared_case(
                folder / volume_format, f"v{index}", imgs, imgs * 2, (1, 1, 1), {}, volume_format=volume_format
            )
            cases.append(
                {
                    "volume_id": f"v{index}",
                    "image": str(path),
                    "has_anatomical_mask": True,
                    "labels": [],
                    "report": None,
                }
            )
        return cases, "random voxels"

    monkeypatch.setattr(loading_rows, "prepared_cases", prepared)
    monkeypatch.setattr(loading_rows, "FULL_SIZE", SIZE)
    monkeypatch.setattr(loading_rows, "_PATCH", (4, 8, 8))
    monkeypatch.setattr(loading_rows, "_SWEPT_BYTES", 2**20)
    monkeypatch.setattr(loading_rows, "_PASSES", 2)
    return prepared


@pytest.mark.parametrize("row", ["loading_chunked", "loading_npz"])
def test_loading(small_volumes, row):
    result = getattr(loading_rows, row)(number=8)
    assert result.refused or result.ratio > 0
    assert "all 8 volumes are equal" in result.equality and result.figures["ours per volume"].endswith(" ms")


def test_reading_and_patches(small_volumes):
    rows = (loading_rows.loading_against_read, loading_rows.patch_read, loading_rows.patch_read_cached)
    for result in (row(number=1, repeats=5) for row in rows):
        assert result.refused or result.ratio > 0
    assert 0 < loading_rows.chunked_size().ratio < 1


def test_volumes_that_differ_have_no_ratio(small_volumes, monkeypatch):
    read = loading_rows.read_prepared_patch
    monkeypatch.setattr(loading_rows, "read_prepared_patch", lambda *arguments: read(*arguments) + 1)
    with pytest.raises(ResultsDiffer, match="patch at"):
        loading_rows.patch_read(number=1)


def test_a_ct_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_CT", "no_such.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"no_such.nii.gz.*unset"):
        volumes.chest_ct(tmp_path)
