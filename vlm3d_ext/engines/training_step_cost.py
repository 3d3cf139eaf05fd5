"""What one training step of a bundle computes, moves and keeps, counted on the meta device by really running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .meta_execution import MetaExecution
from .operation_meter import OperationMeter, Work
from .training_runs import BUNDLES, TrainingRun, load_run
from .weightless_models import WeightlessLanguageModel

__all__ = ["StepCost", "encoder_bytes_per_token", "measure_training_step", "run_step"]


@dataclass(frozen=True)
class StepCost:
    """One micro-batch.

    Attributes:
        trained_parameters: weights that the optimizer moves.
        frozen_parameters: all others, those of text encoder and language model included.
        weight_bytes: of all weights and buffers.
        trained_bytes: of the trained weights; as many again are their gradients, and each of AdamW's two moments.
        batch_bytes: of what is loaded.
        kept_bytes: of what the forward pass leaves behind for the backward pass, results included.
        peak_bytes: the most that is alive at a time beside weights, gradients, moments and batch.
        layer_bytes: of `weight_bytes` those of the language model's layers, which sharding spreads over GPUs.
        num_layers: of the language model, 0 without one.
        quantized_parameters: of `frozen_parameters` those that 4 bits can hold.
        phases: what is done, in its order.
    """

    trained_parameters: float
    frozen_parameters: float
    weight_bytes: float
    trained_bytes: float
    batch_bytes: float
    kept_bytes: float
    peak_bytes: float
    layer_bytes: float
    num_layers: float
    quantized_parameters: float
    phases: Mapping[str, Work]

    @property
    def total_bytes(self) -> float:
        """At the peak, gradients of earlier micro-batches among it."""
        return self.weight_bytes + 3 * self.trained_bytes + self.batch_bytes + self.peak_bytes

    def with_layers(self, other: StepCost, num_layers: int) -> StepCost:
        """Return the cost for `num_layers` layers, from this one and one of more: every layer costs the same."""
        share = (num_layers - self.num_layers) / (other.num_layers - self.num_layers)
        values: dict[str, Any] = {}
        for part in fields(self):
            mine, others = getattr(self, part.name), getattr(other, part.name)
            if part.name == "phases":
                values["phases"] = {name: work.plus(others[name].plus(work, -1), share) for name, work in mine.items()}
            else:
                values[part.name] = mine + share * (others - mine)
        return StepCost(**values)


def measure_training_step(
    name: str,
    options: Mapping[str, Any] | None = None,
    volume_size: Sequence[int] = (64, 512, 512),
    bundles: Path = BUNDLES,
) -> StepCost:
    """Count one micro-batch of a run; see `load_run` for the arguments.

    A language model is counted with one layer of each kind and with two, and the others are added.
    """
    first = load_run(name, options, volume_size, 1, bundles)
    if first.num_layers is None:
        return run_step(first)
    # kinds of layers take turns in some models
    kinds = len(set(first.layer_types)) or 1
    few = first if kinds == 1 else load_run(name, options, volume_size, kinds, bundles)
    more = load_run(name, options, volume_size, 2 * kinds, bundles)
    return run_step(few).with_layers(run_step(more), first.num_layers)


def encoder_bytes_per_token(
    options: Mapping[str, Any] | None = None,
    volume_size: Sequence[int] = (64, 512, 512),
    bundles: Path = BUNDLES,
) -> float:
    """Return the bytes that a block of the encoder keeps for the backward pass, per token and channel.

    Two depths are compared, so that what is kept once cancels out, such as patches and regions. Of the weights' casts,
    which no batch makes more, a share is left.
    """
    kept, runs = [], []
    for num_layers in (1, 3):
        runs.append(load_run("encoder", {**(options or {}), "num_layers": num_layers}, volume_size, bundles=bundles))
        kept.append(run_step(runs[-1]).kept_bytes)
    num_tokens = runs[0].batch["patch_mask"].numel()
    return (kept[1] - kept[0]) / (2 * num_tokens * runs[0].knob("hidden_size"))


def run_step(run: TrainingRun, device: str = "cuda") -> StepCost:
    """Run one micro-batch on the meta device, forward and backward, as `device` would; see `MetaExecution`.

    Gradients of an earlier micro-batch are there already, as with accumulation.
    """
    trainable = run.trainable
    hidden = [held for module in trainable.modules() for held in getattr(module, "_held", ())]
    modules = [trainable, *hidden]
    weights = {id(part): part for module in modules for part in [*module.parameters(), *module.buffers()]}
    parameters = {id(part): part for module in modules for part in module.parameters()}
    trained = [part for part in trainable.parameters() if part.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    batch = [leaf for leaf in tree_leaves(run.batch) if isinstance(leaf, Tensor)]
    language_models = [module for module in trainable.modules() if isinstance(module, WeightlessLanguageModel)]
    share = run.knob("mask_ratio") if run.name == "encoder" else 0.5
    amp = run.config["amp"]
    execution = MetaExecution(device, half=amp if isinstance(amp, bool) else True, selected_share=share)
    if run.name == "rl":
        for model in language_models:
            model.keep_reference()
            weights |= {id(part): part for part in (model._reference or {}).values()}
    meter = OperationMeter([*weights.values(), *(weight.grad for weight in trained), *batch])  # type: ignore[list-item]
    with execution, meter:
        if run.name == "rl":
            phases, kept = _reinforcement_learning(run, execution, meter)
        else:
            phases, kept = _supervised(run, execution, meter)
    num_trained = sum(part.numel() for part in trained)
    return StepCost(
        trained_parameters=num_trained,
        frozen_parameters=sum(part.numel() for part in parameters.values()) - num_trained,
        weight_bytes=_num_bytes(weights.values()),
        trained_bytes=_num_bytes(trained),
        batch_bytes=_num_bytes(batch),
        kept_bytes=kept,
        peak_bytes=meter.peak_bytes,
        layer_bytes=sum(model.layer_bytes for model in language_models),
        num_layers=sum(model.num_layers for model in language_models),
        quantized_parameters=sum(model.quantized_parameters for model in language_models),
        phases=phases,
    )


def _supervised(run: TrainingRun, execution: MetaExecution, meter: OperationMeter) -> tuple[dict[str, Work], int]:
    output = run.trainable(**run.batch)
    loss = run.loss(output)
    return _backward(loss, execution, meter)


def _backward(loss: Tensor, execution: MetaExecution, meter: OperationMeter) -> tuple[dict[str, Work], int]:
    execution.end_forward()
    forward, kept = meter.work(), meter.live_bytes
    execution.backward(loss)
    return {"forward": forward, "backward": meter.work()}, kept


def _reinforcement_learning(
    run: TrainingRun, execution: MetaExecution, meter: OperationMeter
) -> tuple[dict[str, Work], int]:
    """What `GrpoIteration` does: sample, ask the reference policy, move the policy."""
    policy: Any = run.trainable
    model = policy.network.language_model
    batch, num_samples = dict(run.batch), run.knob("num_samples")
    with torch.no_grad():
        prompts = policy.network.prompts(**{key: value for key, value in batch.items() if key != "report"})
    token_ids, mask = model.encode_reports(batch["report"] * num_samples)
    phases = {"sampling": meter.work().plus(_sampling(model, prompts, num_samples, meter))}
    reference = None
    if policy.beta > 0:
        with model.reference_policy():
            reference = policy.log_probabilities(prompts, token_ids, mask)
        phases["reference"] = meter.work()
    advantages = torch.zeros(len(token_ids), device="meta")
    loss = policy(prompts, token_ids, mask, advantages, None, reference, float(mask.numel())).loss
    trained, kept = _backward(loss, execution, meter)
    updates = run.knob("num_updates")
    return {**phases, **{name: work.times(updates) for name, work in trained.items()}}, kept


@torch.no_grad()
def _sampling(model: Any, prompts: Any, num_samples: int, meter: OperationMeter) -> Work:
    """Read the prompts once, then write token by token; one token, in the middle of a report, stands for all."""
    model.eval()
    _, cache = model._fill_cache(prompts.embeddings, prompts.mask)
    work = meter.work()
    num_tokens, (num_prompts, length, width) = model.max_report_tokens, prompts.embeddings.shape
    middle = length + num_tokens // 2
    mask = torch.ones(num_prompts, middle, dtype=torch.bool, device="meta")
    embeddings = torch.zeros(num_prompts, middle, width, dtype=prompts.embeddings.dtype, device="meta")
    _, cache = model._fill_cache(embeddings, mask)
    cache.batch_repeat_interleave(num_samples)
    meter.work()
    rows = num_prompts * num_samples
    model.model(
        input_ids=torch.zeros(rows, 1, dtype=torch.int64, device="meta"),
        attention_mask=torch.ones(rows, middle + 1, dtype=torch.int64, device="meta"),
        position_ids=torch.zeros(rows, 1, dtype=torch.int64, device="meta"),
        use_cache=True,
        **{model._cache_name: cache},
    )
    work = work.plus(meter.work(), num_tokens)
    model.train()
    return work


def _num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
