import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator

from tests.prepared_release import make_prepared_release
from vlm3d_ext.data.case_manifest import CaseManifest
from vlm3d_ext.data.feature_store import FeatureStore
from vlm3d_ext.data.seeded_dataset import SeededDataset
from vlm3d_ext.data.threaded_loader import ThreadedDataLoader
from vlm3d_ext.engines.feature_extraction import run_pending
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.handlers import FeatureWriter
from vlm3d_ext.networks.nets import ThreeDVisionEncoder
from vlm3d_ext.transforms import network_image, prepared_case_transforms

SMALL = {
    "patch_size": (4, 8, 8),
    "hidden_size": 24,
    "num_layers": 1,
    "num_heads": 3,
    "num_depth_heads": 1,
    "mlp_dim": 16,
}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return ThreeDVisionEncoder(**SMALL).eval()


def _extract(encoder, store, cases, batch_size=2):
    dataset = SeededDataset(store.pending(cases), prepared_case_transforms())
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=ThreadedDataLoader(dataset, batch_size, num_workers=2),
        network=encoder,
        prepare_batch=PrepareKeywordBatch(["anatomical_mask", "spacing_mm", "use_anatomical_mask"]),
        val_handlers=[FeatureWriter(store)],
        decollate=False,
    )
    run_pending(evaluator, dataset)
    return evaluator


def test_stored_features_are_those_of_the_encoder(tmp_path, encoder):
    cases = CaseManifest(make_prepared_release(tmp_path, (5, 1, 1))).cases("training")
    store = FeatureStore(tmp_path / "features", {"encoder": "one"})
    _extract(encoder, store, cases)
    transform = prepared_case_transforms()
    for case in cases:
        sample = transform(case)
        with torch.no_grad():
            features = encoder(
                network_image({"image": sample["image"][None]}),
                sample["anatomical_mask"][None] if sample["has_anatomical_mask"] else None,
                sample["spacing_mm"][None],
            )
        stored = store.read(case["volume_id"])
        np.testing.assert_allclose(stored["global_features"], features.global_features[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(stored["region_features"], features.region_features[0], rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(stored["labels"], np.float32(case["labels"]))


def test_a_run_that_was_stopped_does_the_rest_only(tmp_path, encoder):
    cases = CaseManifest(make_prepared_release(tmp_path, (5, 1, 1))).cases("training")
    store = FeatureStore(tmp_path / "features", {"encoder": "one"})
    _extract(encoder, store, cases[:2])
    first = store.path(cases[0]["volume_id"])
    time = first.stat().st_mtime_ns
    evaluator = _extract(encoder, store, cases)
    assert evaluator.state.iteration == 2  # three cases in batches of two
    assert first.stat().st_mtime_ns == time
    assert store.pending(cases) == []


def test_nothing_to_do_is_said_and_is_no_error(tmp_path, encoder, caplog):
    cases = CaseManifest(make_prepared_release(tmp_path, (1, 1, 1))).cases("training")
    store = FeatureStore(tmp_path / "features", {"encoder": "one"})
    _extract(encoder, store, cases)
    with caplog.at_level("INFO"):
        store_again = FeatureStore(tmp_path / "features", {"encoder": "one"})
        dataset = SeededDataset(store_again.pending(cases), prepared_case_transforms())

        class _MustNotRun:
            def run(self):
                raise AssertionError("an engine cannot run over nothing")

        run_pending(_MustNotRun(), dataset)
    assert "Nothing to do" in caplog.text
