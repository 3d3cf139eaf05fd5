"""LesionMaskWriter and LocalizationEvaluation, each attached to an evaluator whose network draws what it is told to."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator
from torch import nn

from tests.engines.drawn_cases import DISEASES, SOURCE, ball, make_case, on_prepared_grid
from vlm3d_ext.data.localization_store import LocalizationStore
from vlm3d_ext.data.prepared_case import PreparedCaseError
from vlm3d_ext.data.scan_reader import read_mask
from vlm3d_ext.handlers.lesion_mask_writer import LesionMaskWriter
from vlm3d_ext.handlers.localization_evaluation import LocalizationEvaluation
from vlm3d_ext.metrics.mask_overlap import dice_score

NODULE, EFFUSION = DISEASES.keys
BIG, SMALL = ball((10, 12, 12), 10.0), ball((6, 27, 30), 6.0)
NOWHERE = np.zeros(SOURCE.shape, dtype=bool)


class Drawing(nn.Module):
    """Takes its input for the probabilities."""

    def __init__(self):
        super().__init__()
        self.register_buffer("thresholds", torch.tensor([0.45, 0.4]))
        self.register_buffer("presence_thresholds", torch.tensor([0.45, 0.4]))

    def forward(self, image):
        return {"probabilities": image}


def batches_of(cases, drawn):
    """Return one batch; volumes are filled up at the ends, as batches of several sizes are."""
    volumes = torch.nn.functional.pad(torch.from_numpy(np.stack(drawn)), (0, 3, 0, 0, 0, 2))
    entries = {name: [case[name] for case in cases] for name in ("volume_id", "geometry")}
    return [{"image": volumes, "label": torch.zeros(len(cases)), **entries}]


def run(handler, cases, drawn, network=None):
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=batches_of(cases, drawn),
        network=network or Drawing(),
        val_handlers=[handler],
        decollate=False,
    )
    evaluator.logger.setLevel(logging.INFO)
    evaluator.run()
    return evaluator


@pytest.fixture
def cases(tmp_path):
    """A scan with a nodule, one with effusion and no nodule, one without anything, one of which nothing is known."""
    folder = tmp_path / "prepared"
    return [
        make_case(folder, "train_1_a_1", {NODULE: BIG}, (1.0, 0.0)),
        make_case(folder, "train_2_a_1", {EFFUSION: BIG | SMALL}, (0.0, 1.0)),
        make_case(folder, "train_3_a_1", {}, (0.0, 0.0)),
        make_case(folder, "train_4_a_1", {}, (math.nan, math.nan)),
    ]


@pytest.fixture
def drawn():
    """The first is drawn well, of the second one lesion is missed, the third has a false positive."""
    return [
        on_prepared_grid(masks) for masks in ((BIG, NOWHERE), (NOWHERE, BIG), (SMALL, NOWHERE), (BIG | SMALL, NOWHERE))
    ]


def evaluation(cases, folder, **options):
    return LocalizationEvaluation(Drawing(), DISEASES, cases, folder, num_resamples=10, **options)


def test_evaluation_reports_what_was_drawn(cases, drawn, tmp_path):
    evaluator = run(evaluation(cases, tmp_path / "out", num_montages=1), cases, drawn)
    written = json.loads((tmp_path / "out" / "localization.json").read_text())
    nodule, effusion = written["per_disease"]
    counts = ("positive_scans", "negative_scans", "unknown_scans", "lesions")
    assert [nodule[name] for name in counts] == [1, 2, 1, 1]
    assert [effusion[name] for name in counts] == [1, 2, 1, 2]
    # What is drawn is what preparation made of the mask, cut at half its height, so the Dice is the ceiling.
    assert nodule["dice"] == pytest.approx(nodule["ceiling_dice"], abs=0.005) and nodule["dice"] > 0.8
    assert nodule["false_positives_per_negative_scan"] == 0.5 and nodule["precision"] == 0.5
    assert effusion["sensitivity"] == 0.5 and effusion["dice"] < effusion["ceiling_dice"]
    assert evaluator.state.metrics["mean_dice"] == pytest.approx((nodule["dice"] + effusion["dice"]) / 2, abs=1e-6)
    assert evaluator.state.metrics["dice_lung_nodule"] == pytest.approx(nodule["dice"], abs=1e-6)
    assert evaluator.state.metrics["mean_sensitivity"] == 0.75
    names = {path.name for path in (tmp_path / "out" / "montages").iterdir()}
    assert names == {
        "best_1_train_1_a_1.png",
        "worst_1_train_2_a_1.png",
        "most_false_positives_1_train_3_a_1.png",
    }


def test_metrics_hold_no_undefined_figure_and_no_pictures_without_being_asked_for(cases, drawn, tmp_path):
    evaluator = run(evaluation(cases[3:], tmp_path / "out", num_montages=0), cases[3:], drawn[3:])
    assert not [name for name in evaluator.state.metrics if "dice" in name]
    assert not (tmp_path / "out" / "montages").exists()
    assert json.loads((tmp_path / "out" / "localization.json").read_text())["mean"]["dice"] is None


def test_a_baseline_stands_beside_the_network(cases, drawn, tmp_path):
    baseline = on_prepared_grid((BIG, BIG | SMALL))
    handler = evaluation(cases, tmp_path, num_montages=0, baseline=baseline, baseline_thresholds=(0.45, 0.45))
    run(handler, cases, drawn)
    rows = json.loads((tmp_path / "localization.json").read_text())["per_disease"]
    for row in rows:
        assert row["baseline_dice"] == pytest.approx(row["ceiling_dice"], abs=0.005)
    with pytest.raises(ValueError, match="a baseline needs its thresholds"):
        evaluation(cases, tmp_path, baseline=baseline)
    with pytest.raises(ValueError, match=r"2 diseases, got 2 and \[0\.5\]"):
        evaluation(cases, tmp_path, baseline=baseline, baseline_thresholds=[0.5])


def test_an_epoch_begins_anew_and_leaves_no_old_pictures(cases, drawn, tmp_path):
    handler = evaluation(cases, tmp_path, num_montages=2)
    run(handler, cases, drawn)
    run(handler, cases[:1], drawn[:1])
    assert json.loads((tmp_path / "localization.json").read_text())["num_scans"] == 1
    assert {path.name for path in (tmp_path / "montages").iterdir()} == {
        "best_1_train_1_a_1.png",
        "worst_1_train_1_a_1.png",
    }


def test_windows_of_a_scan_are_refused(cases, drawn, tmp_path):
    windows = [make_case(tmp_path / "windows", "train_9_a_1", {}, num_windows=2)]
    with pytest.raises(PreparedCaseError, match="one of 2 windows"):
        run(evaluation(windows, tmp_path), windows, drawn[:1])
    store = LocalizationStore(tmp_path / "store", {"f": 1})
    with pytest.raises(PreparedCaseError, match="one of 2 windows"):
        run(LesionMaskWriter(store, DISEASES, Drawing()), windows, drawn[:1])
    assert store.volume_ids() == []


def test_masks_are_written_on_the_scans_own_grid(cases, drawn, tmp_path):
    store = LocalizationStore(tmp_path / "store", {"f": 1})
    run(LesionMaskWriter(store, DISEASES, Drawing(), montages=True), cases, drawn)
    assert store.volume_ids() == [case["volume_id"] for case in cases]
    written, geometry = read_mask(store.mask_path(NODULE, "train_1_a_1"))
    assert geometry == SOURCE.canonical()
    assert dice_score(written > 0, np.ascontiguousarray(SOURCE.to_canonical(BIG))) > 0.8
    effusion = store.read("train_2_a_1")[EFFUSION]
    assert effusion["threshold"] == pytest.approx(0.4) and len(effusion["lesions"]) == 1
    assert effusion["lesions"][0]["probability"] == 1.0
    assert store.montage_path("train_3_a_1").read_bytes().startswith(b"\x89PNG")


def test_thresholds_are_those_of_the_network_when_the_batch_arrives(cases, drawn, tmp_path):
    network = Drawing()
    store = LocalizationStore(tmp_path / "store", {"f": 1})
    writer = LesionMaskWriter(store, DISEASES, network)
    network.thresholds.copy_(torch.tensor([0.95, 0.1]))  # as a checkpoint does that is loaded later
    network.presence_thresholds.copy_(torch.tensor([1.01, 0.1]))
    run(writer, cases[:1], drawn[:1], network)
    read = store.read("train_1_a_1")
    assert read[NODULE]["threshold"] == pytest.approx(0.95) and read[NODULE]["lesions"] == []
    assert not store.montage_path("train_1_a_1").exists()
