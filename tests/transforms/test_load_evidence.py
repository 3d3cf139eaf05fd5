"""From evidence to prompts: what is written, what is drawn, and how scans of different sizes go into one batch."""

import math
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vlm3d_ext.data.evidence_store import EvidenceStore
from vlm3d_ext.data.result_store import ResultStoreError
from vlm3d_ext.data.seeded_dataset import EpochIndex, SeededDataset
from vlm3d_ext.text.lesion_locations import LesionLocation
from vlm3d_ext.transforms.load_evidence import LoadEvidenced, collate_evidence, reference_report

SIZES = {"train_1_a_1": (2, 3, 2), "train_2_a_1": (1, 2, 4), "train_3_a_1": (2, 3, 2)}
NODULE = LesionLocation("lung_nodule", "Lung nodule", "right", ("right_upper_lobe",), (), 7.2, "", 0.2, 1)
EFFUSION = LesionLocation("pleural_effusion", "Pleural effusion", "left", ("pleura",), (), None, "small", 80.0, 1)
NODULE_LINE = "[FINDING] Lung nodule detected in right upper lobe, 7 mm"
EFFUSION_LINE = "[FINDING] Pleural effusion detected on the left, small"


def finding(probability, prediction):
    return {"probability": probability, "threshold": 0.5, "prediction": prediction}


@pytest.fixture
def store(tmp_path):
    store = EvidenceStore(tmp_path, {"fingerprint": "f"})
    generator = np.random.default_rng(0)
    for number, (volume_id, size) in enumerate(SIZES.items()):
        features = {
            "global_features": generator.normal(size=4),
            "region_features": generator.normal(size=(3, 4)),
            "local_features": generator.normal(size=(*size, 4)),
        }
        findings = {
            "Lung nodule": finding(0.8, 1),
            "Emphysema": finding(0.7, 0),
            "Pleural effusion": finding(0.3, 1 - number % 2),
        }
        lesions = [NODULE.to_json(), EFFUSION.to_json()][: 2 - number]
        store.write(volume_id, features, findings, lesions)
    return store


def make_case(volume_id="train_1_a_1", **changes):
    report = {"findings": f"Seen in {volume_id}.", "impression": "Known."}
    return {"volume_id": volume_id, "labels": [1.0, math.nan, 0.0], "report": report, **changes}


def named(prompt):
    """Return the findings that a prompt names, without probabilities."""
    line = next(line for line in prompt.splitlines() if line.startswith("Classified findings: "))
    names = [part.rsplit(" (", 1)[0] for part in line.removeprefix("Classified findings: ").split(", ")]
    return [] if names == ["none"] else names


def test_what_is_predicted_is_written_whatever_its_probability(store):
    got = LoadEvidenced(store)(make_case())
    assert got["prompt"] == (
        "<image>\n"
        "Classified findings: Lung nodule (0.80), Pleural effusion (0.30)\n"
        f"{NODULE_LINE}\n{EFFUSION_LINE}\n"
        "Generate a clinical radiology report based on the CT scan findings:"
    )
    assert got["report"] == "Findings: Seen in train_1_a_1. Impression: Known."
    assert got["volume_id"] == got["evidence_of"] == "train_1_a_1"


def test_features_are_those_of_the_store(store):
    got, features = LoadEvidenced(store)(make_case()), store.read_features("train_1_a_1")
    assert got["local_features"].shape == (12, 4) and got["local_features"].dtype == torch.float32
    np.testing.assert_array_equal(got["local_features"][1 * 6 + 2 * 2 + 1], features["local_features"][1, 2, 1])
    np.testing.assert_array_equal(got["global_features"], features["global_features"])
    np.testing.assert_array_equal(got["region_features"], features["region_features"])
    torch.testing.assert_close(got["labels"], torch.tensor([1.0, math.nan, 0.0]), equal_nan=True)


def test_another_patients_evidence_with_the_cases_own_labels_and_report(store):
    own, other = LoadEvidenced(store)(make_case()), LoadEvidenced(store)(make_case("train_2_a_1"))
    mixed = LoadEvidenced(store)(make_case(evidence_of="train_2_a_1"))
    assert mixed["volume_id"] == "train_1_a_1" and mixed["evidence_of"] == "train_2_a_1"
    for name in ("local_features", "global_features", "region_features"):
        assert torch.equal(mixed[name], other[name]) and not torch.equal(mixed[name], own[name])
    assert mixed["prompt"] == other["prompt"] != own["prompt"]
    assert mixed["report"] == own["report"] and torch.equal(mixed["labels"].isnan(), own["labels"].isnan())


def test_lesions_that_do_not_fit_are_left_out_and_said(store, caplog):
    whole = LoadEvidenced(store)(make_case())["prompt"]
    limit = len(whole.split())
    assert LoadEvidenced(store, max_prompt_tokens=limit)(make_case())["prompt"] == whole
    assert not caplog.records
    got = LoadEvidenced(store, max_prompt_tokens=limit - 1)(make_case())
    shorter = got["prompt"]
    assert NODULE_LINE in shorter and EFFUSION_LINE not in shorter
    assert got["num_lesions_left_out"] == 1 and "1 of 2 lesions are left out" in caplog.text
    letters = LoadEvidenced(store, max_prompt_tokens=len(whole) - 1, count_tokens=len)(make_case())["prompt"]
    assert letters == shorter
    with pytest.raises(ValueError, match="without any lesion"):
        LoadEvidenced(store, max_prompt_tokens=5)(make_case())


def test_a_template_of_ones_own(store, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{image} {findings}; write:")
    prompt = LoadEvidenced(store, prompt=str(path))(make_case())["prompt"]
    assert prompt == "<image> Lung nodule (0.80), Pleural effusion (0.30); write:"


# --- draws ------------------------------------------------------------------------------------------------------------


def test_flips_come_at_their_rate_and_on_both_sides(store):
    data = SeededDataset([make_case()] * 2000, LoadEvidenced(store, finding_flips=0.2), seed=0)
    names = [named(data[index]["prompt"]) for index in range(2000)]
    # of a share of 0.2 in 2000, the standard deviation is 0.009
    for finding_name, rate in {"Lung nodule": 0.8, "Emphysema": 0.2, "Pleural effusion": 0.8}.items():
        assert np.mean([finding_name in one for one in names]) == pytest.approx(rate, abs=0.03)
    both = np.mean([("Lung nodule" not in one) and ("Emphysema" in one) for one in names])
    assert both == pytest.approx(0.04, abs=0.015)  # each is drawn by itself


def test_a_flipped_finding_looks_like_one_that_the_classifier_names(store):
    """Its probability is drawn above the threshold: with its own, below it, the flip would show."""
    threshold = store.read(make_case()["volume_id"])["findings"]["Emphysema"]["threshold"]
    transform = LoadEvidenced(store, finding_flips=1.0)
    drawn = []
    for seed in range(200):
        transform.set_random_state(seed=seed)
        (named,) = re.findall(r"Classified findings: Emphysema \((\d\.\d\d)\)\n", transform(make_case())["prompt"])
        drawn.append(float(named))
    assert min(drawn) >= round(threshold, 2) - 0.005 and max(drawn) <= 1
    assert np.mean(drawn) == pytest.approx((1 + threshold) / 2, abs=0.03)


def test_lesions_are_dropped_at_their_rate_each_by_itself(store):
    data = SeededDataset([make_case()] * 1000, LoadEvidenced(store, lesion_dropout=0.3), seed=0)
    kept = np.array([[line in data[index]["prompt"] for line in (NODULE_LINE, EFFUSION_LINE)] for index in range(1000)])
    np.testing.assert_allclose(kept.mean(0), 0.7, atol=0.05)
    assert (~kept).all(1).mean() == pytest.approx(0.09, abs=0.03)


def test_draws_are_seeded_by_epoch_and_sample(store):
    def prompts(seed, epoch):
        transform = LoadEvidenced(store, finding_flips=0.5, lesion_dropout=0.5)
        data = SeededDataset([make_case()] * 12, transform, seed=seed)
        return [data[EpochIndex(epoch, index)]["prompt"] for index in range(12)]

    assert prompts(0, 0) == prompts(0, 0)
    assert prompts(0, 0) != prompts(0, 1) and prompts(0, 0) != prompts(1, 0)
    assert len(set(prompts(0, 0))) > 1


def test_workers_draw_what_the_main_process_draws(store):
    data = SeededDataset([make_case()] * 6, LoadEvidenced(store, finding_flips=0.5), seed=0)
    here, there = (
        [batch["prompt"] for batch in DataLoader(data, 2, num_workers=workers, collate_fn=collate_evidence)]
        for workers in (0, 1)
    )
    assert here == there


def test_without_flips_every_draw_is_the_same(store):
    data = SeededDataset([make_case()] * 3, LoadEvidenced(store), seed=0)
    assert len({data[EpochIndex(epoch, index)]["prompt"] for epoch in range(3) for index in range(3)}) == 1


# --- batches ----------------------------------------------------------------------------------------------------------


def test_scans_of_different_sizes_are_filled_up_and_masked(store):
    transform = LoadEvidenced(store)
    samples = [transform(make_case(volume_id)) for volume_id in SIZES]
    batch = collate_evidence(samples)
    assert batch["local_features"].shape == (3, 12, 4)
    assert batch["token_mask"].sum(1).tolist() == [12, 8, 12]
    assert batch["token_mask"][1].tolist() == [True] * 8 + [False] * 4
    for row, sample in enumerate(samples):
        assert torch.equal(batch["local_features"][row][batch["token_mask"][row]], sample["local_features"])
    assert (batch["local_features"][~batch["token_mask"]] == 0).all()
    assert batch["volume_id"] == list(SIZES) and batch["prompt"] == [sample["prompt"] for sample in samples]
    assert batch["global_features"].shape == (3, 4) and batch["labels"].shape == (3, 3)
    assert "token_mask" not in samples[1]  # the samples themselves are left alone


def test_scans_of_one_size_need_no_mask(store):
    transform = LoadEvidenced(store)
    batch = collate_evidence([transform(make_case(volume_id)) for volume_id in ("train_1_a_1", "train_3_a_1")])
    assert "token_mask" not in batch and batch["local_features"].shape == (2, 12, 4)


# --- reports and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"findings": "A.", "impression": "B."}, "Findings: A. Impression: B."),
        ({"findings": "", "impression": "B."}, "Impression: B."),
        ({"findings": "A.", "impression": None}, "Findings: A."),
        ({"findings": "A."}, "Findings: A."),
        (None, ""),
    ],
)
def test_the_reference_report(report, expected):
    assert reference_report({"report": report}) == expected


def test_a_case_without_report_entry():
    assert reference_report({"volume_id": "train_1_a_1"}) == ""


def test_missing_evidence_is_named(store):
    with pytest.raises(ResultStoreError, match=r"train_9_a_1\.json: no readable evidence"):
        LoadEvidenced(store)(make_case("train_9_a_1"))
    store.features_path("train_2_a_1").unlink()
    with pytest.raises(ResultStoreError, match=r"train_2_a_1\.npz: no readable evidence"):
        LoadEvidenced(store)(make_case("train_2_a_1"))
