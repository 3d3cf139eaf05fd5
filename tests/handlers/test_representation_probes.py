import csv
import json

import pytest
import torch
from monai.engines import SupervisedEvaluator

from tests.tiny_pretraining import make_loaders, make_network
from vlm3d_ext.engines.keyword_batch import PrepareKeywordBatch
from vlm3d_ext.handlers import CheckpointWeights, RepresentationProbes
from vlm3d_ext.handlers.representation_probes import format_figures
from vlm3d_ext.metrics import MeanLoss


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """A run that loads weights and then probes them; what it wrote, and its metrics."""
    folder = tmp_path_factory.mktemp("evaluation")
    loaders, names = make_loaders(folder)
    torch.save({"model": make_network(seed=3).state_dict()}, folder / "model.pt")
    network = make_network(seed=0)
    probes = RepresentationProbes(network, loaders, "ct_rate_18", folder / "eval", num_resamples=10)
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=loaders["test"],
        network=network,
        prepare_batch=PrepareKeywordBatch(),
        key_val_metric={"reconstruction": MeanLoss(name="reconstruction")},
        val_handlers=[CheckpointWeights(folder / "model.pt", {"model": network}), probes],
        decollate=False,
    )
    evaluator.run()
    return folder / "eval", evaluator.state.metrics, names, network, probes


def test_figures_are_among_the_metrics_and_in_the_file(evaluation):
    folder, metrics, _, _, _ = evaluation
    content = json.loads((folder / "representation.json").read_text())
    assert metrics["reconstruction"] > 0  # the evaluator's own metric is still there
    for name, value in content["figures"].items():
        assert value is None or metrics[name] == pytest.approx(value, abs=1e-6)
    assert {"effective_rank_trained", "linear_probe_macro_auroc_histogram"} <= set(content["figures"])


def test_the_untrained_encoder_is_the_one_before_weights_were_loaded(evaluation):
    _, metrics, _, network, probes = evaluation
    assert torch.equal(network.encoder.patch_embedding.weight, make_network(seed=3).encoder.patch_embedding.weight)
    untrained = probes.untrained.encoder.patch_embedding.weight
    assert torch.equal(untrained, make_network(seed=0).encoder.patch_embedding.weight)
    assert metrics["reconstruction_error_trained"] != metrics["reconstruction_error_untrained"]


def test_a_row_per_label_probe_and_source(evaluation):
    folder, _, names, _, _ = evaluation
    with open(folder / "representation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sources = {(row["probe"], row["features"]) for row in rows}
    linear = ("trained_unguided", "trained_guided", "untrained_unguided", "untrained_guided", "histogram")
    assert sources == {("linear_probe", source) for source in linear} | {
        ("knn", "trained_unguided"),
        ("knn", "untrained_unguided"),
    }
    assert len(rows) == 7 * len(names)
    assert json.loads((folder / "representation.json").read_text())["per_label"][0]["label"] == rows[0]["label"]


def test_the_picture_is_a_picture(evaluation):
    from matplotlib.image import imread

    picture = imread(evaluation[0] / "representation.png")
    assert picture.shape[1] == 9 * 120 and picture[..., :3].std() > 0.05


def test_the_table_puts_figures_beside_what_they_must_beat():
    figures = {
        "linear_probe_macro_auroc_trained_unguided": 0.9123,
        "linear_probe_macro_auroc_trained_unguided_low": 0.85,
        "linear_probe_macro_auroc_trained_unguided_high": 0.95,
        "linear_probe_macro_auroc_untrained_unguided": 0.6,
        "linear_probe_macro_auroc_histogram": 0.7,
        "effective_rank_trained": float("nan"),
    }
    lines = {line[:38].strip(): line[38:].split() for line in format_figures(figures).splitlines()}
    row = lines["linear probe macro AUROC, unguided"]
    assert row == ["0.9123", "0.6000", "0.7000", "(histogram)", "[0.850,", "0.950]"]
    assert lines["effective rank"] == ["-", "-", "-"]
    assert lines[""] == ["trained", "untrained", "baseline"]
