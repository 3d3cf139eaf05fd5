import numpy as np
import pytest

from vlm3d_ext.data.feature_store import FeatureStore, FeatureStoreError

ORIGIN = {"checkpoint_sha256": "a" * 64, "manifest": "m", "region_features": (20, 8)}
CASES = [{"volume_id": f"train_{n}_a_1"} for n in range(4)]


def _write(store, volume_id):
    generator = np.random.default_rng(int(volume_id.split("_")[1]))
    store.write(volume_id, generator.random(8), generator.random((20, 8)), np.array([1.0, np.nan, 0.0]))


def test_round_trip(tmp_path):
    store = FeatureStore(tmp_path / "features", ORIGIN)
    region_features = np.random.default_rng(0).random((20, 8))
    store.write("train_1_a_1", np.arange(8.0), region_features, np.array([1.0, np.nan]))
    read = FeatureStore(tmp_path / "features").read("train_1_a_1")
    np.testing.assert_array_equal(read["global_features"], np.arange(8))
    np.testing.assert_allclose(read["region_features"], region_features, rtol=1e-6)
    np.testing.assert_array_equal(read["labels"], [1, np.nan])
    assert {array.dtype for array in read.values()} == {np.dtype("float32")}


def test_extraction_goes_on_where_it_stopped(tmp_path):
    store = FeatureStore(tmp_path, ORIGIN)
    assert store.pending(CASES) == CASES
    for case in CASES[:2]:
        _write(store, case["volume_id"])
    before = store.path("train_0_a_1").read_bytes()
    again = FeatureStore(tmp_path, ORIGIN)
    assert again.pending(CASES) == CASES[2:]
    _write(again, "train_2_a_1")
    assert again.pending(CASES) == CASES[3:]
    assert again.path("train_0_a_1").read_bytes() == before


def test_another_origin_is_refused_and_what_differs_is_named(tmp_path):
    FeatureStore(tmp_path, ORIGIN)
    other = {**ORIGIN, "checkpoint_sha256": "b" * 64, "amp": True}
    with pytest.raises(
        FeatureStoreError, match=r"made with another amp, checkpoint_sha256; choose another --output_dir"
    ):
        FeatureStore(tmp_path, other)
    assert FeatureStore(tmp_path).origin["checkpoint_sha256"] == "a" * 64  # the store is as it was


def test_opening_what_is_not_there(tmp_path):
    with pytest.raises(FeatureStoreError, match=r"features\.json: no such file; make features first with the encoder"):
        FeatureStore(tmp_path)


def test_an_index_that_is_not_json(tmp_path):
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(FeatureStoreError, match=r"features\.json: not JSON.*; delete .* and make it again"):
        FeatureStore(tmp_path, ORIGIN)


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_a_truncated_file(tmp_path, keep):
    store = FeatureStore(tmp_path, ORIGIN)
    _write(store, "train_1_a_1")
    path = store.path("train_1_a_1")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        FeatureStoreError, match=r"train_1_a_1\.npz: no readable features .*extract them again"
    ) as error:
        store.read("train_1_a_1")
    assert "\n" not in str(error.value)


def test_files_that_are_absent_or_hold_something_else(tmp_path):
    store = FeatureStore(tmp_path, ORIGIN)
    with pytest.raises(FeatureStoreError, match="no readable features"):
        store.read("train_9_a_1")
    np.savez(store.path("train_1_a_1"), global_features=np.zeros(3))
    with pytest.raises(FeatureStoreError, match="region_features"):
        store.read("train_1_a_1")
    np.savez(store.path("train_2_a_1"), global_features=np.array([None]), region_features=0, labels=0)
    with pytest.raises(FeatureStoreError, match="pickled Python objects"):
        store.read("train_2_a_1")
