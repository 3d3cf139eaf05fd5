"""What a block keeps for the backward pass: everything, its matrix products, or its input alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

__all__ = ["ACTIVATION_CHECKPOINTING", "check_activation_checkpointing", "run_block"]

ACTIVATION_CHECKPOINTING = ("none", "selective", "full")

_ATTENTION = {
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}
# operation -> the place of the second factor (in, out) among its arguments
_PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}


def check_activation_checkpointing(mode: str) -> str:
    """Return the mode.

    Raises:
        ValueError: if there is no such mode.
    """
    if mode not in ACTIVATION_CHECKPOINTING:
        raise ValueError(f"activation_checkpointing must be one of {ACTIVATION_CHECKPOINTING}, got {mode!r}.")
    return mode


def run_block(block: nn.Module, mode: str, *inputs: Any) -> Any:
    """Run a block; in training, keep for its backward pass what the mode says. Results and gradients do not depend on
    it.

    ``"none"`` keeps whatever each operation asks for. ``"selective"`` keeps the block's input, the results of attention
    and of the matrix products, and computes all else again, which costs little: normalisations, activations,
    rearranged copies. ``"full"`` keeps the input only and computes the whole block again, a third more work.

    Under ``"selective"`` a product that narrows its input, the last of a transformer's MLP, is not kept: nothing in the
    block needs its result, and recomputation ends before it.

    Source: selective activation recomputation, Korthikanti et al., "Reducing activation recomputation in large
    transformer models", MLSys 2023.

    Args:
        block: of a network.
        mode: one of `ACTIVATION_CHECKPOINTING`.
        inputs: of the block.
    """
    if mode == "none" or not block.training:
        return block(*inputs)
    if mode == "selective":
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_selective_contexts)
    return checkpoint(block, *inputs, use_reentrant=False)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    place = _PRODUCTS.get(operation)
    if place is not None:
        num_inputs, num_outputs = args[place].shape
        if num_outputs >= num_inputs:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
