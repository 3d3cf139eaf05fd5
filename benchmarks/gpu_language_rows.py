"""Steps that involve a language model: joint training, and reinforcement learning."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vlm3d_ext.engines.grpo_iteration import GrpoIteration
from vlm3d_ext.metrics.report_rewards import RewardBreakdown
from vlm3d_ext.networks.nets import PolicyTraining
from vlm3d_ext.text.label_set import load_label_set

from .device_clock import MachineRates, device_row, measure_rates, middle_and_spread, step_seconds
from .random_batches import evidence_batch, first_case, joint_batch
from .random_models import TINY, drawn_language_model, write_text_model
from .row import ResultsDiffer, Row
from .shipped_training import ShippedTraining
from .training_rows import training_figures

__all__ = ["gpu_grpo_step", "gpu_joint_step"]

FULL_SIZE = (64, 512, 512)
_CHECKPOINTED = {"activation_checkpointing": "selective", "gradient_checkpointing": True}
# In bfloat16 two ways to the same logits, which are near 0 with random weights, round apart by this much at most.
_LOG_PROBABILITY_TOLERANCE = 0.05
_BYTES_OF_BF16 = 2
_TEXT_HIDDEN_SIZE = 768


@device_row(None)
def gpu_joint_step(
    device: str = "cuda",
    batch_size: int = 8,
    size: Sequence[int] = FULL_SIZE,
    language_models: Sequence[str] = (TINY, "llama_3_1_8b"),
    report_words: int = 250,
    num_steps: int = 5,
    text_layers: int = 12,
    rate_sizes: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Row:
    """seconds of a joint step as the multitask bundle's train.json has it, with the last language model; no peer"""
    rates = measure_rates(device, **(rate_sizes or {}))
    figures: dict[str, Any] = {"batch": f"{batch_size} of {tuple(size)}, reports of {report_words} words"}
    seconds = spread = None
    equality = "no language model fits"
    for name in language_models:
        for recomputed in ({}, _CHECKPOINTED):
            where = f"with {name}" + (", checkpointed" if recomputed else "")
            try:
                changes = {**recomputed, **knobs}
                measured = _joint(device, name, batch_size, size, report_words, num_steps, text_layers, rates, changes)
            except torch.OutOfMemoryError:
                seconds = spread = None
                figures[where] = f"the device's memory is not enough for a batch of {batch_size}"
                continue
            finally:
                _free()
            equality, (seconds, spread, more) = measured
            figures[where] = {"step": f"{seconds:.4g} s", **more}
            break
    return Row(
        "gpu_joint_step", gpu_joint_step.__doc__ or "", seconds, None, equality, spread=spread,
        figures={**figures, **rates.figures()},
    )  # fmt: skip


def _joint(
    device: str,
    language_model: str,
    batch_size: int,
    size: Sequence[int],
    report_words: int,
    num_steps: int,
    text_layers: int,
    rates: MachineRates,
    knobs: Mapping[str, Any],
) -> tuple[str, tuple[float, float, dict[str, str]]]:
    with tempfile.TemporaryDirectory() as name:
        words, texts = Path(name) / "language_model", Path(name) / "text_model"
        words.mkdir()
        texts.mkdir()
        changes = {
            "text_model": str(write_text_model(texts, knobs.get("text_hidden_size", _TEXT_HIDDEN_SIZE), text_layers)),
            # what the manifest would say of the labels
            "trainable::classification_loss": {
                "_target_": "vlm3d_ext.losses.WeightedBinaryCrossEntropy",
                "positive_weights": [1.0] * load_label_set("ct_rate_18").num_findings,
            },
            **knobs,
        }
        with drawn_language_model(language_model, device, words) as model:
            training = ShippedTraining("multitask", device, changes={"language_model": model, **changes})
            training.knob("network_def").localization.text_embedder.embeddings.normal_()
        batch = joint_batch(training, batch_size, size, report_words)
        equality = training.check_precision(first_case(batch))
        return equality, training_figures(training, batch, num_steps, rates)


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@device_row(None)
def gpu_grpo_step(
    device: str = "cuda",
    batch_size: int = 1,
    size: Sequence[int] = FULL_SIZE,
    language_model: str = "llama_3_1_8b",
    num_samples: int = 4,
    new_tokens: int = 512,
    num_steps: int = 3,
    rate_sizes: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Row:
    """seconds of a step of reinforcement learning as train_rl.json has it, generation and policy step; no peer"""
    rates = measure_rates(device, **(rate_sizes or {}))
    with tempfile.TemporaryDirectory() as folder, drawn_language_model(language_model, device, Path(folder)) as name:
        changes = {"language_model": name, "max_report_tokens": new_tokens, "num_samples": num_samples, **knobs}
        training = ShippedTraining("report_generation", device, ("train.json", "train_rl.json"), changes)
    policy: Any = training.network
    policy.network.language_model.keep_reference()
    # all texts as long as they may be, so that every step does the same work
    iteration = GrpoIteration(
        policy, _RandomRewards(), num_samples, training.knob("num_updates"),  # type: ignore[arg-type]
        generation={"min_new_tokens": new_tokens},
    )  # fmt: skip
    batch = evidence_batch(training, batch_size, size)
    engine = SimpleNamespace(
        network=policy, optimizer=training.optimizer, optim_set_to_none=True, amp=True,
        state=SimpleNamespace(device=training.device), fire_event=lambda event: None,
    )  # fmt: skip
    prompts = _prompts(policy, batch, training.device)
    equality = _check_sharing(iteration, prompts)
    with torch.autocast(training.device.type, torch.bfloat16):
        generation, _ = middle_and_spread(step_seconds(lambda: iteration.sample(prompts), device, num_steps, 1))
    seconds, spread = middle_and_spread(step_seconds(lambda: iteration(engine, batch), device, num_steps, 1))
    num_weights = policy.network.language_model.num_base_parameters
    prompt_length = prompts.mask.shape[1]
    read = num_weights * _BYTES_OF_BF16 * new_tokens / 1e12 / rates.copy_tb_s
    # forward of reference and policy, and backward to the activations, two operations each: no gradient of the weights
    passes = 6 * num_weights * batch_size * (prompt_length + num_samples * new_tokens)
    return Row(
        "gpu_grpo_step",
        gpu_grpo_step.__doc__ or "",
        seconds,
        None,
        equality,
        spread=spread,
        figures={
            "step": f"{batch_size} prompt(s) of {prompt_length} positions x {num_samples} reports of {new_tokens} "
            f"tokens, {num_weights / 1e9:.3g}G weights",
            "generation": f"{generation:.4g} s",
            "policy step and the rest": f"{seconds - generation:.4g} s",
            "reading the weights once for each token": f"{read:.3g} s",
            "three passes of the weights' products": f"{passes / 1e12 / rates.matrix_tflops:.3g} s",
            **rates.figures(),
        },
    )


class _RandomRewards:
    """Judges reports by chance, so that all groups have something to compare."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def __call__(self, reports: Sequence[str], *_: Any) -> RewardBreakdown:
        return RewardBreakdown(self._random.random(len(reports)), {}, {}, {}, ())


def _prompts(policy: PolicyTraining, batch: Mapping[str, Any], device: torch.device) -> Any:
    inputs = {name: value.to(device) for name, value in batch.items() if name.endswith("_features")}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        return policy.network.prompts(prompt=batch["prompt"], **inputs)


@torch.no_grad()
def _check_sharing(iteration: GrpoIteration, prompts: Any) -> str:
    """Compare log-probabilities of short samples, the prompt shared by all and repeated for each."""
    model = iteration.policy.network.language_model
    samples = model.generate(
        prompts, num_samples=iteration.num_samples, max_new_tokens=8, do_sample=True, min_new_tokens=8
    )
    shared, repeated = (
        model.log_probabilities(prompts, samples.token_ids, samples.mask, share_prefix=share) for share in (True, False)
    )
    difference = float((shared - repeated).abs().mean())
    if not difference <= _LOG_PROBABILITY_TOLERANCE:
        raise ResultsDiffer(f"log-probabilities with shared and repeated prompts are {difference:.3g} apart on average")
    return f"log-probabilities with shared and repeated prompts are {difference:.2g} apart on average"
