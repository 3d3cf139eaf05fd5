"""Rows that mean something on a GPU only: seconds of training steps, beside what the machine itself sustains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .device_clock import (
    DeviceClock,
    available,
    device_row,
    measure_rates,
    middle_and_spread,
    step_seconds,
    synchronize,
)
from .gpu_language_rows import gpu_grpo_step, gpu_joint_step
from .prepared_volumes import smooth_volume, write_prepared_set
from .random_batches import first_case, localization_batch, pretraining_batch
from .row import ResultsDiffer, Row
from .shipped_training import ShippedTraining
from .training_rows import timed_training

__all__ = [
    "available",
    "gpu_encoder_step",
    "gpu_grpo_step",
    "gpu_joint_step",
    "gpu_loading_exposed",
    "gpu_localizer_step",
    "machine_rates",
]

FULL_SIZE = (64, 512, 512)
_STEP_TARGET_S = 0.35
_EXPOSED_TARGET_S = 0.005


@device_row(None)
def machine_rates(device: str = "cuda", **sizes: Any) -> Row:
    """what the device sustains: bf16 matrix products, copies on it, copies from the host; no peer"""
    figures = measure_rates(device, **sizes).figures()
    return Row("machine_rates", machine_rates.__doc__ or "", None, None, "rates, nothing to compare", figures=figures)


@device_row(_STEP_TARGET_S)
def gpu_encoder_step(
    device: str = "cuda",
    batch_size: int = 16,
    size: Sequence[int] = FULL_SIZE,
    num_steps: int = 10,
    rate_sizes: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Row:
    """seconds of a pre-training step of the encoder as train.json has it; no peer"""
    training = ShippedTraining("encoder", device, changes=knobs)
    batch = pretraining_batch(training, batch_size, size)
    equality = training.check_precision(first_case(batch))
    figures = {"batch": f"{batch_size} of {tuple(size)}, activations {training.knob('activation_checkpointing')}"}
    return timed_training(
        "gpu_encoder_step", gpu_encoder_step.__doc__ or "", _STEP_TARGET_S, training, batch, num_steps, equality,
        measure_rates(device, **(rate_sizes or {})), figures,
    )  # fmt: skip


@device_row(_STEP_TARGET_S)
def gpu_localizer_step(
    device: str = "cuda",
    batch_size: int = 8,
    size: Sequence[int] = FULL_SIZE,
    num_steps: int = 10,
    rate_sizes: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Row:
    """seconds of a training step of the localizer for five diseases as train.json has it; no peer"""
    training = ShippedTraining("localization", device, changes=knobs)
    training.knob("network_def").text_embedder.embeddings.normal_()
    batch = localization_batch(training, batch_size, size)
    equality = training.check_precision(first_case(batch))
    crops, diseases = batch["target"].shape[1:3]
    figures = {
        "batch": f"{batch_size} of {tuple(size)}, {crops} crops of {tuple(batch['target'].shape[3:])} each, "
        f"{diseases} diseases"
    }
    return timed_training(
        "gpu_localizer_step", gpu_localizer_step.__doc__ or "", _STEP_TARGET_S, training, batch, num_steps, equality,
        measure_rates(device, **(rate_sizes or {})), figures,
    )  # fmt: skip


@device_row(_EXPOSED_TARGET_S)
def gpu_loading_exposed(
    device: str = "cuda",
    step_s: float = _STEP_TARGET_S,
    num_cases: int = 64,
    batch_size: int = 16,
    size: Sequence[int] = FULL_SIZE,
    volume_format: str = "blosc2",
    num_epochs: int = 5,
    matrix_size: int = 8192,
    rate_sizes: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> Row:
    """seconds by which loading lengthens a step as long as the encoder's target; no peer"""
    work = _work_of(step_s, device, matrix_size)
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_prepared_set(Path(folder), num_cases, size, volume_format)
        knobs = {"manifest": str(manifest), "batch_size": batch_size, **knobs}
        equality = _check_loaded(device, size, {**knobs, "intensity_augmentation": 0.0})
        training = ShippedTraining("encoder", device, changes=knobs)
        loader, prepare = training.knob("train::dataloader"), training.knob("prepare_batch")

        def consume(batch: Mapping[str, Any]) -> None:
            prepare(batch, device, non_blocking=True)
            work()

        loaded, first = [], []
        for epoch in range(num_epochs):
            loader.sampler.set_epoch(epoch)
            seconds = _seconds_of(loader, consume, device)
            first.append(seconds[0])
            loaded += seconds[1:]
        resident = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in next(iter(loader)).items()
        }
    without, _ = middle_and_spread(_seconds_of([resident] * len(loaded), consume, device))
    with_loading, spread = middle_and_spread(loaded)
    exposed = with_loading - without
    return Row(
        "gpu_loading_exposed",
        gpu_loading_exposed.__doc__ or "",
        exposed,
        _EXPOSED_TARGET_S,
        equality,
        spread=spread * with_loading / abs(exposed) if exposed else 0.0,
        figures={
            "batch": f"{batch_size} of {tuple(size)} as {volume_format}, from the page cache",
            "step with loading": f"{with_loading:.4g} s",
            "with data on the device": f"{without:.4g} s",
            "first step of an epoch": f"{middle_and_spread(first)[0]:.4g} s",
            "threads": training.knob("num_workers"),
            **measure_rates(device, **(rate_sizes or {})).figures(),
        },
    )


def _work_of(seconds: float, device: str, matrix_size: int) -> Callable[[], None]:
    """Return a function that keeps the device busy for some seconds."""
    one, other = torch.randn(2, matrix_size, matrix_size, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(one)
    each, _ = middle_and_spread(step_seconds(lambda: torch.mm(one, other, out=product), device, 20))
    number = max(1, round(seconds / each))

    def work() -> None:
        for _ in range(number):
            torch.mm(one, other, out=product)

    return work


def _seconds_of(batches: Iterable[Any], consume: Callable[[Any], None], device: str) -> list[float]:
    """Return the seconds from batch to batch, waiting for it included."""
    clock = DeviceClock(device)
    clock.mark()
    for batch in batches:
        consume(batch)
        # as a trainer does when it looks at the gradients' norm: the host does not run ahead
        synchronize(clock.device)
        clock.mark()
    return clock.seconds()


def _check_loaded(device: str, size: Sequence[int], knobs: Mapping[str, Any]) -> str:
    """Compare the images of one epoch with what was written."""
    training = ShippedTraining("encoder", device, changes=knobs)
    prepare, num_images = training.knob("prepare_batch"), 0
    for batch in training.knob("train::dataloader"):
        images = prepare(batch, device)[0].cpu().numpy()
        for volume_id, image in zip(batch["volume_id"], images, strict=True):
            expected = smooth_volume(size, int(volume_id.split("_")[1]) - 1)[0].astype(np.float32) / 255
            if not np.array_equal(image[0], expected):
                raise ResultsDiffer(f"{volume_id}: the image on the device is not the one that was written")
            num_images += 1
    return f"all {num_images} images arrive on the device as they were written"
