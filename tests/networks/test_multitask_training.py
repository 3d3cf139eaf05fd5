"""What a case contributes is what it has, by gradient; and weights that are learnt."""

import math

import pytest
import torch

from tests.networks.tiny_multitask import tiny_batch, tiny_training
from tests.tiny_language_model import make_tiny_language_model
from tests.tiny_text_model import make_tiny_text_model
from vlm3d_ext.losses import WeightedLossSum
from vlm3d_ext.text.disease_set import load_disease_set

WEIGHTS = {"classification": 1.0, "masks": 2.0, "denoising": 0.2, "report": 1.5, "region_share": 0.5}
PARTS = {
    "labels": ("classification",),
    "target": ("masks",),
    "report": ("report",),
    "anatomical_mask": ("region_share",),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    texts = [disease.description for disease in load_disease_set().diseases]
    return (
        make_tiny_language_model(folder / "language_model", max_positions=2048, words=["Findings", "nodule"]),
        make_tiny_text_model(folder / "text_model", max_positions=96, texts=texts),
    )


@pytest.fixture(scope="module")
def training(folders):
    return tiny_training(*folders)


def without(batch, row, *names):
    """Return the batch with case `row` lacking its labels, masks, report or anatomical mask."""
    batch = {name: value.clone() if torch.is_tensor(value) else list(value) for name, value in batch.items()}
    for name in names:
        if name == "labels":
            batch["labels"][row] = math.nan
        elif name == "target":
            batch["target"][row] = 255
        elif name == "report":
            batch["report"][row] = ""
        else:
            batch["has_anatomical_mask"][row] = False
    return batch


def rows_of(batch, rows):
    return {
        name: value[rows] if torch.is_tensor(value) else [value[row] for row in rows] for name, value in batch.items()
    }


def gradients(training, batch, weights=WEIGHTS):
    training.zero_grad(set_to_none=True)
    WeightedLossSum(weights)(training(**batch)).backward()
    return {name: weight.grad.clone() for name, weight in training.named_parameters() if weight.grad is not None}


def assert_same(one, other, scale=1.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, scale * other[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("missing", PARTS)
def test_a_case_without_one_answer_contributes_exactly_its_other_losses(training, missing):
    batch = without(tiny_batch(1), 0, missing)
    weights = {**WEIGHTS, **dict.fromkeys(PARTS[missing], 0.0)}
    found = gradients(training, batch)
    expected = gradients(training, tiny_batch(1), weights)
    assert max(value.abs().max() for value in found.values()) > 1e-3
    assert_same(found, expected)
    losses = training(**batch)["losses"]
    assert all(losses[name] == 0 for name in PARTS[missing])
    assert all(losses[name] > 0 for name in WEIGHTS if name not in (*PARTS[missing], "denoising"))


def test_a_batch_is_the_mean_of_its_cases(training):
    batch = without(without(without(tiny_batch(3), 0, "report"), 1, "target", "labels"), 2, "anatomical_mask")
    whole = gradients(training, batch)
    single = [gradients(training, rows_of(batch, [row])) for row in range(3)]
    mean = {name: sum(one[name] for one in single) / 3 for name in whole}
    assert_same(whole, mean)


def test_a_case_without_anything_has_a_gradient_of_zeros_everywhere(training):
    """Distributed training waits for the gradient of each weight."""
    found = gradients(training, without(tiny_batch(1), 0, *PARTS))
    trainable = {name for name, weight in training.named_parameters() if weight.requires_grad}
    assert found.keys() == trainable
    assert all(not value.any() for value in found.values())


def test_every_trainable_weight_has_a_gradient_and_the_encoder_learns_from_each_task(folders):
    training = tiny_training(*folders, max_noise=0.5)
    found = gradients(training, tiny_batch(2))
    assert found.keys() == {name for name, weight in training.named_parameters() if weight.requires_grad}
    for task in ("classification", "masks", "report", "region_share"):
        only = gradients(training, tiny_batch(2), {**dict.fromkeys(WEIGHTS, 0.0), task: 1.0})
        assert only["network.encoder.patch_embedding.weight"].abs().max() > 0, task
    training.network.report_generation.language_model.model.zero_grad()
    assert not any("lm_head" in name for name in found)


def test_a_frozen_encoder_gets_no_gradient_and_stays_in_evaluation_mode(folders):
    training = tiny_training(*folders, train_encoder=False)
    found = gradients(training, tiny_batch(1))
    assert found and not any(name.startswith("network.encoder.") for name in found)
    assert not training.train().network.encoder.training and training.network.classification.classifier.training


def test_validation_looks_at_each_case_without_and_with_its_mask(folders):
    training = tiny_training(*folders).eval()
    batch = without(tiny_batch(2, crops=False), 1, "anatomical_mask")
    with torch.no_grad():
        output = training(**batch)
        guided = training.network(
            batch["image"], batch["anatomical_mask"], batch["spacing_mm"], torch.tensor([True, True]), generate=False
        )
        unguided = training.network(batch["image"], spacing_mm=batch["spacing_mm"], generate=False)
    logits, labels = output["classification"]["logits"], output["classification"]["labels"]
    assert logits.shape == labels.shape == (2, 2, 18 + 5)
    peaks = torch.stack([mask.flatten(1).amax(1) for mask in unguided["localization"].values()], dim=1)
    torch.testing.assert_close(logits[:, 0, 18:].sigmoid(), peaks)
    assert torch.equal(logits[:, 0, 18:], logits[:, 1, 18:]) and labels[..., 18:].isnan().all()
    logits, labels = logits[..., :18], labels[..., :18]
    torch.testing.assert_close(logits[:, 0], unguided["classification"]["logits"])
    torch.testing.assert_close(logits[0, 1], guided["classification"]["logits"][0])
    assert torch.equal(labels[:, 0], batch["labels"]) and torch.equal(labels[0, 1], batch["labels"][0])
    assert labels[1, 1].isnan().all()
    drawn = torch.stack(list(unguided["localization"].values()), dim=1)
    torch.testing.assert_close(output["localization"]["probabilities"], drawn)
    assert torch.equal(output["localization"]["target"], batch["target"])


# --- weights that are learnt ------------------------------------------------------------------------------------------


def test_learnt_weights_begin_as_the_fixed_ones(folders, training):
    learnt = tiny_training(*folders, weighting="uncertainty")
    batch = tiny_batch(2)
    torch.testing.assert_close(WeightedLossSum(WEIGHTS)(learnt(**batch)), WeightedLossSum(WEIGHTS)(training(**batch)))


def test_a_learnt_weight_goes_where_the_formula_says(folders):
    learnt = tiny_training(*folders, weighting="uncertainty")
    batch = without(tiny_batch(2), 0, "report")
    with torch.no_grad():
        learnt.log_variances["masks"].fill_(0.7)
    output = learnt(**batch)
    losses = {name: float(loss) for name, loss in output["losses"].items()}
    total = (
        losses["classification"] + 2.0 * (math.exp(-0.7) * losses["masks"] + 0.7) + 0.2 * losses["denoising"]
        + 1.5 * losses["report"] + 0.5 * losses["region_share"]
    )  # fmt: skip
    assert float(WeightedLossSum(WEIGHTS)(output)) == pytest.approx(total, rel=1e-5)
    found = gradients(learnt, batch)
    assert float(found["log_variances.masks"]) == pytest.approx(2.0 * (1 - math.exp(-0.7) * losses["masks"]), rel=1e-4)
    # half of the cases have a report, so its regulariser counts half
    assert float(found["log_variances.report"]) == pytest.approx(1.5 * (0.5 - losses["report"]), rel=1e-4)


def test_an_absent_task_moves_no_learnt_weight(folders):
    learnt = tiny_training(*folders, weighting="uncertainty")
    found = gradients(learnt, without(tiny_batch(1), 0, "report"))
    assert float(found["log_variances.report"]) == 0 and float(found["log_variances.masks"]) != 0


def test_an_unknown_weighting_is_named(folders):
    with pytest.raises(ValueError, match=r"weighting must be one of \('fixed', 'uncertainty'\), got 'dynamic'"):
        tiny_training(*folders, weighting="dynamic")
