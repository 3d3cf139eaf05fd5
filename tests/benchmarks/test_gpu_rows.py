"""Every row runs on the CPU at tiny sizes; one test runs them where there is CUDA."""

import itertools
import time

import pytest
import torch

from benchmarks import device_clock, gpu_language_rows, gpu_rows
from benchmarks.device_clock import (
    DeviceClock,
    MachineRates,
    device_row,
    measure_rates,
    middle_and_spread,
    step_seconds,
)
from benchmarks.random_batches import first_case, joint_batch, report_of_words
from benchmarks.row import ResultsDiffer
from benchmarks.shipped_training import ShippedTraining
from benchmarks.training_rows import training_figures
from vlm3d_ext.networks.nets import ImagePrefixLanguageModel

RATES = {"matrix_size": 64, "copied_bytes": 4096, "seconds": 0.01}
SIZE = (8, 16, 32)
ENCODER = {
    "patch_size": [2, 4, 4],
    "hidden_size": 24,
    "num_layers": 1,
    "num_heads": 4,
    "num_depth_heads": 1,
    "mlp_dim": 32,
}
SENTENCES = {"num_true_sentences": 2, "num_untrue_sentences": 3}
LOCALIZER = {
    **ENCODER, "text_hidden_size": 64, "denoising_layers": 1, "denoising_mlp_dim": 24, "stem_channels": 4,
    "base_channels": 8, "head_channels": 4, "level_strides": [[2, 2, 2], [2, 2, 2]], "crop_size": [4, 16, 16],
}  # fmt: skip
REPORTS = {"num_queries": 4, "projector_layers": 1, "projector_heads": 4, "lora_rank": 2, "max_prompt_tokens": 1024}
JOINT = {**LOCALIZER, **REPORTS, "projection_dim": 16, "num_soft_tokens": 2}


def options_of(name, device="cpu"):
    """Return options with which a row takes about a second."""
    rates = {"device": device, "rate_sizes": RATES}
    steps = {"size": SIZE, "num_steps": 3}
    return {
        "machine_rates": {"device": device, **RATES},
        "gpu_encoder_step": {**rates, **steps, "batch_size": 2, **ENCODER, **SENTENCES},
        "gpu_localizer_step": {**rates, **steps, "batch_size": 2, **LOCALIZER},
        "gpu_joint_step": {
            **rates, **steps, "batch_size": 2, "language_models": ("tiny",), "report_words": 8, "text_layers": 1,
            **JOINT,
        },
        "gpu_grpo_step": {
            **rates, "size": SIZE, "num_steps": 2, "language_model": "tiny", "num_samples": 2, "new_tokens": 5,
            "patch_size": [2, 4, 4], "hidden_size": 24, **REPORTS,
        },
        "gpu_loading_exposed": {
            **rates, "size": SIZE, "step_s": 0.01, "num_cases": 6, "batch_size": 2, "num_epochs": 2, "matrix_size": 32,
            "num_workers": 1, **ENCODER, **SENTENCES,
        },
    }[name]  # fmt: skip


ROWS = (
    "machine_rates",
    "gpu_encoder_step",
    "gpu_localizer_step",
    "gpu_joint_step",
    "gpu_grpo_step",
    "gpu_loading_exposed",
)


def check_row(name, row):
    assert row.name == name and row.what and not row.refused
    assert {"matrix products here", "copying here", "host to device here"} <= row.figures.keys()
    if name != "machine_rates":
        assert isinstance(row.ratio, float) and row.spread is not None and row.spread >= 0


@pytest.mark.parametrize("name", ROWS)
def test_rows_at_tiny_sizes(name):
    check_row(name, getattr(gpu_rows, name)(**options_of(name)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ROWS)
def test_rows_on_a_gpu(name):
    check_row(name, getattr(gpu_rows, name)(**options_of(name, "cuda")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("name", ROWS)
def test_without_cuda_a_row_says_so(name):
    row = getattr(gpu_rows, name)()
    assert row.verdict == "refused" and row.refused == "there is no CUDA device here"
    assert row.name == name and not gpu_rows.available()


# --- time and rates ---------------------------------------------------------------------------------------------------


def test_the_clock_measures_from_mark_to_mark():
    clock = DeviceClock("cpu")
    for seconds in (0.02, 0.06):
        clock.mark()
        time.sleep(seconds)
    clock.mark()
    first, second = clock.seconds()
    assert 0.02 <= first < 0.05 and 0.06 <= second < 0.1


def test_steps_before_the_first_are_not_measured():
    calls = itertools.count()
    seconds = step_seconds(lambda: time.sleep(0.05 if next(calls) < 2 else 0.0), "cpu", num_steps=4, num_warm_up=2)
    assert next(calls) == 6 and len(seconds) == 4 and max(seconds) < 0.02


def test_median_and_spread_by_hand():
    assert middle_and_spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, pytest.approx(2 / 3))


def test_rates_are_work_by_time(monkeypatch):
    monkeypatch.setattr(device_clock, "_calls_per_second", lambda action, device, seconds: (action(), 5.0)[1])
    rates = measure_rates("cpu", matrix_size=100, copied_bytes=10**6)
    assert rates.matrix_tflops == pytest.approx(5 * 2 * 100**3 / 1e12)
    assert rates.copy_tb_s == pytest.approx(5 * 2e6 / 1e12) and rates.host_to_device_gb_s == pytest.approx(5e6 / 1e9)


def test_calls_per_second():
    assert device_clock._calls_per_second(lambda: time.sleep(0.002), torch.device("cpu"), 0.1) == pytest.approx(
        480, rel=0.3
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_told_with_the_sizes():
    @device_row(0.5)
    def too_large(device="cuda", batch_size=16, **knobs):
        """what"""
        raise torch.OutOfMemoryError

    row = too_large(device="cpu", hidden_size=768)
    assert row.name == "too_large" and row.what == "what" and row.target == 0.5 and row.verdict == "refused"
    assert "batch_size 16" in row.refused and "'hidden_size': 768" in row.refused


def test_a_language_model_that_does_not_fit_leaves_the_figures_of_those_that_do(monkeypatch):
    tried = []

    def joint(device, language_model, *sizes_and_knobs):
        checkpointed = sizes_and_knobs[-1].get("gradient_checkpointing", False)
        tried.append((language_model, checkpointed))
        if language_model == "large" or not checkpointed:
            raise torch.OutOfMemoryError
        return "equal", (2.0, 0.1, {"peak memory": "3 GiB"})

    monkeypatch.setattr(gpu_language_rows, "_joint", joint)
    rows = [
        gpu_rows.gpu_joint_step(device="cpu", language_models=names, rate_sizes=RATES)
        for names in (("tiny",), ("tiny", "large"))
    ]
    assert tried[2:] == [("tiny", False), ("tiny", True), ("large", False), ("large", True)]
    assert rows[0].ratio == 2.0 and rows[1].ratio is None and not rows[1].refused
    assert rows[1].figures["with tiny, checkpointed"] == {"step": "2 s", "peak memory": "3 GiB"}
    assert "not enough for a batch of 8" in rows[1].figures["with large, checkpointed"]


# --- what is equal ----------------------------------------------------------------------------------------------------


def test_a_step_trains_and_operations_are_counted():
    torch.manual_seed(0)
    training = ShippedTraining("encoder", "cpu", changes={**ENCODER, **SENTENCES, "learning_rate": 1e-2})
    batch = gpu_rows.pretraining_batch(training, 2, SIZE)
    before = float(training.loss(batch).detach())
    seconds, _, figures = training_figures(training, batch, 5, MachineRates(1e-6, 1.0, 1.0))
    assert float(training.loss(batch).detach()) < before
    operations = training.operations(batch)
    assert figures["operations"] == f"{operations / 1e12:.4g} TFLOP"
    assert figures["step against that"] == f"{seconds / (operations / 1e6):.3g}"
    # forward and backward, at least three times what the linear layers take forward
    tokens, width = 2 * 4 * 4 * 8, 24
    assert operations > 3 * 2 * tokens * (4 * width**2 + 2 * width * 32)


def test_losses_that_depend_on_the_precision_are_told(monkeypatch):
    training = ShippedTraining("encoder", "cpu", changes={**ENCODER, **SENTENCES})
    monkeypatch.setattr(training, "loss", lambda batch, half: torch.tensor(1.0 if half else 1.2))
    with pytest.raises(ResultsDiffer, match=r"1 in bfloat16 and 1\.2 in float32"):
        training.check_precision({})
    monkeypatch.setattr(training, "loss", lambda batch, half: torch.tensor(1.0 if half else 1.01))
    assert training.check_precision({}) == "the first case's loss is 1 in bfloat16 and 1.01 in float32"
    assert training.network.training


def test_images_that_change_on_the_way_are_told(monkeypatch):
    draw = gpu_rows.smooth_volume
    monkeypatch.setattr(gpu_rows, "smooth_volume", lambda size, seed: draw(size, seed + 1))
    with pytest.raises(ResultsDiffer, match="is not the one that was written"):
        gpu_rows.gpu_loading_exposed(**options_of("gpu_loading_exposed"))


def test_log_probabilities_that_differ_are_told(monkeypatch):
    right = ImagePrefixLanguageModel.log_probabilities

    def wrong(self, prompts, token_ids, mask, share_prefix=True, temperature=1.0):
        return right(self, prompts, token_ids, mask, share_prefix, temperature) + (0.1 if share_prefix else 0.0)

    monkeypatch.setattr(ImagePrefixLanguageModel, "log_probabilities", wrong)
    with pytest.raises(ResultsDiffer, match=r"0\.1 apart"):
        gpu_rows.gpu_grpo_step(**options_of("gpu_grpo_step"))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_joint_batch_has_crops_within_the_scan_and_its_first_case_none():
    knobs = {"crop_size": [4, 8, 16], "num_crops": 3, "label_set": "ct_rate_18"}
    training = ShippedTraining("localization", "cpu", changes={**LOCALIZER, **knobs})
    batch = joint_batch(training, 2, SIZE, 12)
    starts = batch["crop_start"]
    assert batch["target"].shape == (2, 3, 5, 4, 8, 16) and starts.shape == (2, 3, 3)
    assert (starts % torch.tensor([2, 4, 4]) == 0).all()
    assert (starts >= 0).all() and (starts + torch.tensor([4, 8, 16]) <= torch.tensor(SIZE)).all()
    case = first_case(batch)
    assert "crop_start" not in case and case["target"].shape == (1, 5, *SIZE) and len(case["report"]) == 1
    assert torch.equal(case["image"], batch["image"][:1])


def test_reports_have_as_many_words_as_asked_for():
    assert [len(report_of_words(number).split()) for number in (0, 1, 14, 250)] == [0, 1, 14, 250]
