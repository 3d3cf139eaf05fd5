"""Running a network on the meta device as a GPU, or this processor, would run it in bfloat16.

On meta tensors autocast does nothing and attention falls apart into its matrix products. Both are put right here, one
level above, where functions of torch are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["MetaExecution"]

_HALF = frozenset(
    "linear matmul __matmul__ mm bmm addmm baddbmm einsum conv1d conv2d conv3d conv_transpose3d bilinear prelu".split()
)
# What autocast computes in float32, as far as this package and the models of transformers that it runs use it.
_FLOAT32 = {
    "cuda": frozenset(
        "layer_norm group_norm softmax log_softmax cosine_similarity normalize norm logsumexp exp log log1p rsqrt "
        "reciprocal pow __pow__ square cumsum prod sum mse_loss l1_loss nll_loss cross_entropy softplus interpolate "
        "binary_cross_entropy_with_logits".split()
    ),
    "cpu": frozenset("mse_loss l1_loss nll_loss binary_cross_entropy_with_logits prod avg_pool3d".split()),
}


class MetaExecution(TorchFunctionMode):
    """Makes meta tensors behave as tensors of a device would under autocast.

    - Matrix products and convolutions take bfloat16, what autocast does in float32 takes float32. The cast of a weight
      is kept until `end_forward`, as autocast keeps it to the end of its context.
    - Attention is one fused kernel: without a mask the flash kernel, with one the memory-efficient kernel (on "cpu" its
      own), so that only queries, keys, values and results are kept of it.
    - ``x[mask]`` with a boolean mask selects `selected_share` of the places, because how many it would be is not known.
    - The truth of a tensor is False: no shortcut is taken for masks that mask nothing.
    - Who asks torch whether there is autocast on "meta", or switches it off, which torch refuses, gets an answer.

    Autocast knows more operations; those that no network here uses are not treated.

    Args:
        device: "cuda" or "cpu", whose autocast and attention kernels are followed.
        half: whether there is autocast at all.
        selected_share: in [0, 1].

    Raises:
        ValueError: for another device.
    """

    def __init__(self, device: str = "cuda", half: bool = True, selected_share: float = 0.5) -> None:
        super().__init__()
        if device not in _FLOAT32:
            raise ValueError(f"device must be one of {sorted(_FLOAT32)}, got {device!r}.")
        self.device = device
        self.half = half
        self.selected_share = selected_share
        self._casts: dict[int, Tensor] | None = {}
        self._answers = ExitStack()

    def __enter__(self) -> MetaExecution:
        answers: list[tuple[Any, str, Callable]] = [
            (torch, "is_autocast_enabled", lambda: self.half),
            (torch, "get_autocast_dtype", lambda: torch.bfloat16),
            (torch, "autocast", self._autocast),
            (torch.amp, "autocast", self._autocast),
            (torch.amp, "is_autocast_available", lambda: True),
        ]
        for module, name, ours in answers:
            self._answers.enter_context(patch.object(module, name, _answer_for_meta(getattr(module, name), ours)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._answers.close()

    @contextmanager
    def _autocast(self, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> Iterator[None]:
        before, self.half = self.half, enabled
        try:
            yield
        finally:
            self.half = before

    def end_forward(self) -> None:
        """Let go of the weights' casts that no operation has kept."""
        self._casts = None

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a scalar, with all that it computes again.

        ``loss.backward()`` is itself a function of torch that a mode is asked about, and while it is, no mode is asked
        about anything else: what is computed again would be computed in another way than before.
        """
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name == "__bool__" and args[0].is_meta:
            return False
        if name == "__getitem__" and _is_mask(args[1]):
            num_selected = round(self.selected_share * args[1].numel())
            place = torch.zeros(num_selected, dtype=torch.int64, device="meta")
            return args[0][(place,) * args[1].ndim]
        if self.half and name in _HALF:
            args, kwargs = tree_map(self._to_half, (args, kwargs))
        elif self.half and name in _FLOAT32[self.device]:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _to_half(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype is not torch.float32:
            return value
        if self._casts is None or not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._casts:
            # made without a graph, a cast would cut the weight off from gradients that are asked for later
            with torch.enable_grad():
                self._casts[id(value)] = value.to(torch.bfloat16)
        return self._casts[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        aten = torch.ops.aten
        if self.half:
            query, key, value, attn_mask = (self._to_half(part) for part in (query, key, value, attn_mask))
        if enable_gqa:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        if attn_mask is not None:
            attn_mask = _bias(attn_mask, query)
        if self.device == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and query.dtype is torch.bfloat16:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
        )[0]


def _answer_for_meta(others: Callable, ours: Callable) -> Callable:
    """Return a function that asks `ours` about the device "meta", and `others` about all others."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        named = dict(kwargs)
        device = args[0] if args else named.pop("device_type", None)
        return ours(*args[1:], **named) if device == "meta" else others(*args, **kwargs)

    return answer


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.is_meta and index.dtype is torch.bool


def _to_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.is_meta and value.dtype is torch.bfloat16
    return value.to(torch.float32) if is_half else value


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """Return a mask as what is added to the logits."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
