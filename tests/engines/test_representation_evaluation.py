import math

import numpy as np
import pytest
import torch

from tests.tiny_pretraining import PATCH, make_loaders, make_network
from vlm3d_ext.engines.representation_evaluation import (
    _label_features,
    collect_split,
    evaluate_representation,
    position_wise_errors,
    reconstruction_error,
)
from vlm3d_ext.metrics import intensity_histogram
from vlm3d_ext.networks.layers import region_shares_of_mask, volume_to_patches
from vlm3d_ext.transforms import network_image

CPU = torch.device("cpu")


def _whole(loader):
    """Return all of a loader's cases as one batch."""
    batches = list(loader)
    whole = {
        name: torch.cat([batch[name] for batch in batches])
        for name, value in batches[0].items()
        if isinstance(value, torch.Tensor)
    }
    return {**whole, "image": network_image(whole)}


def test_errors_of_constant_predictions_by_hand(tmp_path):
    """Black everywhere, and every region equally likely."""
    network = make_network()
    for layer in (network.heads.reconstruction, network.encoder.region_classifier):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    loader = make_loaders(tmp_path)[0]["training"]
    result, batch = collect_split(network, loader, CPU), _whole(loader)

    brightness = volume_to_patches(batch["image"], PATCH).mean(-1)
    hidden = batch["patch_mask"]
    expected = torch.stack([brightness[row][hidden[row]].mean() for row in range(20)]).mean()
    assert reconstruction_error(network, loader, CPU) == pytest.approx(expected.item(), rel=1e-5)

    shares = region_shares_of_mask(batch["anatomical_mask"], PATCH, 20)[batch["has_anatomical_mask"]]
    assert len(shares) == 15
    # what a token holds more of than 1/21 was given away to wrong regions
    expected = (shares - 1 / 21).clamp_min(0).sum(-1).mean()
    assert result.region_share_error == pytest.approx(expected.item(), rel=1e-5)


def test_features_and_histograms_are_those_of_each_case_in_order(tmp_path):
    network, loader = make_network(), make_loaders(tmp_path)[0]["test"]
    result, batch = collect_split(network, loader, CPU), _whole(loader)
    np.testing.assert_array_equal(result.labels, batch["labels"].numpy())
    with torch.no_grad():
        features = network.encoder(batch["image"], spacing_mm=batch["spacing_mm"])
    np.testing.assert_allclose(result.unguided[:, 0], features.global_features, atol=1e-4)
    np.testing.assert_allclose(result.unguided[:, 1:], features.region_features, atol=1e-4)
    np.testing.assert_allclose(result.histogram[5], intensity_histogram(batch["image"][5].numpy()))
    same = np.abs(result.guided - result.unguided).max((1, 2)) < 1e-4
    np.testing.assert_array_equal(same, ~batch["has_anatomical_mask"].numpy())  # a missing mask cannot guide
    assert 0 < same.sum() < len(same)


def test_nothing_depends_on_how_cases_are_put_into_batches(tmp_path):
    network = make_network()
    loaders = [make_loaders(tmp_path, batch_size=size)[0]["validation"] for size in (1, 3)]
    results = [collect_split(network, loader, CPU) for loader in loaders]
    np.testing.assert_allclose(results[0].guided, results[1].guided, atol=1e-4)
    errors = [reconstruction_error(network, loader, CPU) for loader in loaders]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert results[0].region_share_error == pytest.approx(results[1].region_share_error, rel=1e-4)
    torch.testing.assert_close(results[0].mean_patches, results[1].mean_patches)


def test_position_wise_means_are_the_trivial_prediction(tmp_path):
    loaders, _ = make_loaders(tmp_path)
    training = collect_split(make_network(), loaders["training"], CPU)
    batch = _whole(loaders["training"])
    patches = volume_to_patches(batch["image"], PATCH)
    torch.testing.assert_close(training.mean_patches, patches.mean(0))
    shares = region_shares_of_mask(batch["anatomical_mask"], PATCH, 20)[batch["has_anatomical_mask"]]
    torch.testing.assert_close(training.mean_shares, shares.mean(0))

    test = _whole(loaders["test"])
    error = (volume_to_patches(test["image"], PATCH) - patches.mean(0)).abs().mean(-1)
    expected = torch.stack([error[row][test["patch_mask"][row]].mean() for row in range(12)]).mean()
    figures = position_wise_errors(training.mean_patches, training.mean_shares, loaders["test"], PATCH, 20)
    assert figures[0] == pytest.approx(expected.item(), rel=1e-5)
    assert figures[1] == pytest.approx(0.0, abs=1e-6)  # the release's masks are all the same
    assert all(math.isnan(value) for value in position_wise_errors(None, None, loaders["test"], PATCH, 20))


def test_there_is_no_position_wise_mean_of_volumes_of_different_sizes(tmp_path):
    batch = next(iter(make_loaders(tmp_path)[0]["test"]))
    larger = {**batch, "image": batch["image"].repeat(1, 1, 2, 1, 1), "patch_mask": batch["patch_mask"].repeat(1, 2)}
    larger["anatomical_mask"] = batch["anatomical_mask"].repeat(1, 2, 1, 1)
    result = collect_split(make_network(), [batch, larger, batch], CPU)
    assert result.mean_patches is None and result.mean_shares is None
    assert len(result.guided) == 12


def test_a_label_sees_the_global_feature_and_the_regions_where_it_lives():
    features = np.arange(2 * 4 * 2, dtype=float).reshape(2, 4, 2)  # two cases, global and three regions, two channels
    two_regions, no_region = _label_features(features, [[1, 3], []])
    np.testing.assert_array_equal(two_regions, [[0, 1, 2, 3, 6, 7], [8, 9, 10, 11, 14, 15]])
    np.testing.assert_array_equal(no_region, [[0, 1], [8, 9]])


def test_cases_in_which_nothing_is_hidden_do_not_lower_the_reconstruction_error(tmp_path):
    network, loader = make_network(), make_loaders(tmp_path, batch_size=4)[0]["validation"]
    batch = next(iter(loader))
    halved = {**batch, "patch_mask": batch["patch_mask"] & torch.tensor([True, False, True, False])[:, None]}
    kept = {name: value[::2] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    expected = reconstruction_error(network, [kept], CPU)
    assert reconstruction_error(network, [halved], CPU) == pytest.approx(expected, rel=1e-5)


def test_the_report_compares_encoders_with_what_any_of_them_must_beat(tmp_path):
    loaders, names = make_loaders(tmp_path)
    report = evaluate_representation(
        {"trained": make_network(0), "untrained": make_network(1)}, loaders, names, [[7]] * 18, CPU, num_resamples=20
    )
    figures = report.figures
    for name in ("trained", "untrained"):
        assert {f"{f}_{name}" for f in ("reconstruction_error", "region_share_error", "effective_rank")} <= set(figures)
        assert 1 <= figures[f"effective_rank_{name}"] <= 12
    assert figures["reconstruction_error_training_mean"] < figures["reconstruction_error_untrained"]
    # the two findings of the release are bright blocks, which a histogram tells apart
    assert figures["linear_probe_macro_auroc_histogram"] > 0.9
    for source in ("histogram", "trained_guided", "untrained_unguided"):
        name = f"linear_probe_macro_auroc_{source}"
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]

    rows = [row for row in report.per_label if row["features"] == "histogram"]
    assert [row["label"] for row in rows] == list(names)
    defined = {row["label"]: row["auroc"] for row in rows if row["auroc"] is not None}
    assert set(defined) == {"Pleural effusion", "Cardiomegaly"}  # all others are always absent or unknown
    assert np.mean(list(defined.values())) == pytest.approx(figures["linear_probe_macro_auroc_histogram"], abs=1e-3)
    by_name = {row["label"]: row for row in rows}
    assert (by_name["Pleural effusion"]["test_positives"], by_name["Pleural effusion"]["test_known"]) == (6, 12)
    assert (by_name["Hiatal hernia"]["test_positives"], by_name["Hiatal hernia"]["test_known"]) == (0, 0)


def test_evaluating_twice_gives_the_same_figures(tmp_path):
    loaders, names = make_loaders(tmp_path, (8, 4, 6))
    first, second = (
        evaluate_representation({"trained": make_network()}, loaders, names, [[]] * 18, CPU, 10).figures
        for _ in range(2)
    )
    assert first.keys() == second.keys() and len(first) > 10
    np.testing.assert_array_equal(list(first.values()), list(second.values()))
