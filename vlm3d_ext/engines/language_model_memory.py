"""How many parameters a language model and its adapters have, and how much memory fine-tuning them takes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ADAPTER_BYTES",
    "GATHERED_LAYERS",
    "LORA_TARGETS",
    "NF4_BITS",
    "PHASES",
    "PRECISIONS",
    "LanguageModelSize",
    "PhaseMemory",
    "Workload",
    "estimate_phase",
    "measure_language_model",
]

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PHASES = ("align", "rl")
PRECISIONS = ("bf16", "nf4")
# 4 bits, an 8-bit scale for each 64 weights, a 32-bit scale for each 256 scales
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# weight, gradient and the two moments of AdamW, all in the same type
ADAPTER_BYTES = {"float32": 16, "bfloat16": 8}
# What a GPU holds of gathered layers, where they are sharded: the weights of the one that computes, the buffer in which
# they came, and that of the next one.
GATHERED_LAYERS = 3
# What is left of a GPU beside the CUDA context and what the allocator cannot use.
USABLE_SHARE = 0.9
_BF16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class LanguageModelSize:
    """What of an architecture decides on memory.

    Attributes:
        base_parameters: all weights, tied ones once.
        quantized_parameters: weights of linear layers except the head, those that 4 bits can hold.
        lora_parameters: of the adapters.
        lora_rank: of the adapters.
        layer_parameters: of `base_parameters` those within transformer layers, which sharding spreads over GPUs.
        largest_layer: of these, those of the largest layer.
        hidden_size: width.
        intermediate_size: width between up and down projection.
        num_layers: transformer layers.
        num_heads: attention heads.
        num_key_value_heads: heads of keys and values.
        head_dim: width of a head.
        vocab_size: tokens.
        norms_per_layer: normalisations of the full width in a layer.
        cache_windows: for each layer the most tokens that its cache keeps, None for all.
        is_eager: whether attention matrices are held, because the architecture caps their logits.
    """

    base_parameters: int
    quantized_parameters: int
    lora_parameters: int
    lora_rank: int
    layer_parameters: int
    largest_layer: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norms_per_layer: int
    cache_windows: tuple[int | None, ...]
    is_eager: bool


@dataclass(frozen=True)
class Workload:
    """What one GPU does at a time.

    Attributes:
        batch_size: cases.
        num_samples: reports generated of a case in the rl phase.
        prompt_tokens: of the visual prefix and the words before the report.
        max_new_tokens: of a report.
        adapter_dtype: one of `ADAPTER_BYTES`: of adapters, their gradients and moments.
        projector_parameters: of the image projector, or None to leave it out; it is trained in align, in float32.
    """

    batch_size: int = 1
    num_samples: int = 4
    prompt_tokens: int = 512
    max_new_tokens: int = 512
    adapter_dtype: str = "float32"
    projector_parameters: int | None = None

    def __post_init__(self) -> None:
        for field in ("batch_size", "num_samples", "prompt_tokens", "max_new_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.adapter_dtype not in ADAPTER_BYTES:
            raise ValueError(f"adapter_dtype must be one of {tuple(ADAPTER_BYTES)}, got {self.adapter_dtype!r}.")
        if self.projector_parameters is not None and self.projector_parameters < 0:
            raise ValueError(f"projector_parameters must not be negative, got {self.projector_parameters}.")

    @property
    def num_tokens(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.max_new_tokens


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes that one phase of training takes at its peak; estimates.

    Attributes:
        weights: the frozen language model.
        trained: adapters with gradients and AdamW moments, and the projector.
        kv_cache: keys and values while reports are generated; 0 where none are.
        activations: what the forward pass keeps for the backward pass, and the logits.
        sharded: of `weights` what can be spread over GPUs; 0 where nothing can.
        gathered: what a GPU holds of gathered layers at a time when weights are spread.
    """

    weights: float
    trained: float
    kv_cache: float
    activations: float
    sharded: float
    gathered: float

    @property
    def total(self) -> float:
        """On one GPU: reports are generated before the backward pass, so that the cache is gone by then."""
        return self.weights + self.trained + max(self.kv_cache, self.activations)

    def num_gpus(self, gpu_bytes: float) -> int | None:
        """Return the fewest GPUs on which it fits, each with the whole workload, or None if no number is enough.

        They divide what is `sharded` among them, as `vlm3d_ext.engines.sharded_layers` does; all else each has whole.

        Args:
            gpu_bytes: memory of one; 90 % of it are taken as usable.
        """
        usable = USABLE_SHARE * gpu_bytes
        if self.total <= usable:
            return 1
        free = usable - (self.total - self.sharded) - self.gathered
        if not self.sharded or free <= 0:
            return None
        return max(2, math.ceil(self.sharded / free))


def measure_language_model(config: Mapping[str, Any], lora_rank: int, lora_alpha: int = 128) -> LanguageModelSize:
    """Count on the meta device, which takes neither memory nor time, what a model and its adapters have.

    Source: low-rank adapters, Hu et al., "LoRA: low-rank adaptation of large language models", ICLR 2022.

    Args:
        config: as in the ``config.json`` of a causal language model with gated feed-forward layers, such as Llama or
            Gemma.
        lora_rank: of the adapters of `LORA_TARGETS`.
        lora_alpha: scale of the adapters; it changes no size.

    Raises:
        ValueError: if the rank is below 1.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    if lora_rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {lora_rank}.")
    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    layers = model.model.layers
    of_layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    adapters = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in an older way
        model = get_peft_model(model, adapters, low_cpu_mem_usage=True)
    kinds = getattr(settings, "layer_types", None) or ["full_attention"] * len(layers)
    return LanguageModelSize(
        base_parameters=base_parameters,
        quantized_parameters=sum(module.weight.numel() for module in linear),
        lora_parameters=sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name),
        lora_rank=lora_rank,
        layer_parameters=sum(of_layers),
        largest_layer=max(of_layers),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_layers=len(layers),
        num_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=layers[0].self_attn.head_dim,
        vocab_size=settings.vocab_size,
        norms_per_layer=sum(name.endswith("layernorm") for name, _ in layers[0].named_children()),
        cache_windows=tuple(settings.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        is_eager=getattr(settings, "attn_logit_softcapping", None) is not None,
    )


def estimate_phase(
    size: LanguageModelSize, workload: Workload, phase: str, precision: str, gradient_checkpointing: bool = True
) -> PhaseMemory:
    """Estimate the memory of a phase of training.

    The activations are an estimate: what the forward pass of transformers keeps of each token in bfloat16, layer by
    layer, namely the normalisations' inputs in float32 and outputs, queries, keys, values and attention outputs, four
    tensors of the gated feed-forward layer, and the adapters' inner values; attention matrices where `is_eager`.
    Adapters in float32 keep a copy of their input in float32 each, as peft makes it outside of autocast. With gradient
    checkpointing only each layer's input is kept, and one layer at a time in full. The logits of all tokens are held
    in bfloat16, in float32 and as a gradient.

    Args:
        size: of the model.
        workload: of one GPU.
        phase: ``"align"`` trains projector and adapters on one sequence per case; ``"rl"`` generates `num_samples`
            reports of each case and trains the adapters on them, all in one backward pass.
        precision: of the frozen weights, ``"bf16"``, or ``"nf4"`` for those of linear layers except the head.
        gradient_checkpointing: compute each layer again in the backward pass.

    Raises:
        ValueError: if phase or precision is unknown.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES}, got {phase!r}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    num_sequences = workload.batch_size * (workload.num_samples if phase == "rl" else 1)
    bits = NF4_BITS if precision == "nf4" else 8 * _BF16
    whole = size.base_parameters - size.quantized_parameters
    projector_bytes = ADAPTER_BYTES["float32"] if phase == "align" else _FLOAT32
    return PhaseMemory(
        weights=size.quantized_parameters * bits / 8 + whole * _BF16,
        trained=size.lora_parameters * ADAPTER_BYTES[workload.adapter_dtype]
        + (workload.projector_parameters or 0) * projector_bytes,
        kv_cache=num_sequences * _cache_bytes(size, workload.num_tokens) if phase == "rl" else 0,
        activations=num_sequences * _activation_bytes(size, workload, gradient_checkpointing),
        sharded=size.layer_parameters * _BF16 if precision == "bf16" else 0,
        gathered=GATHERED_LAYERS * size.largest_layer * _BF16,
    )


def _cache_bytes(size: LanguageModelSize, num_tokens: int) -> int:
    """Return the bytes of keys and values of one sequence."""
    kept = sum(num_tokens if window is None else min(num_tokens, window) for window in size.cache_windows)
    return 2 * kept * size.num_key_value_heads * size.head_dim * _BF16


def _activation_bytes(size: LanguageModelSize, workload: Workload, gradient_checkpointing: bool) -> int:
    """Return the bytes that the forward pass of one sequence keeps."""
    hidden, intermediate, num_tokens = size.hidden_size, size.intermediate_size, workload.num_tokens
    head_width = size.num_heads * size.head_dim
    attended = 2 * (head_width + size.num_key_value_heads * size.head_dim)
    layer = size.norms_per_layer * hidden * (_FLOAT32 + _BF16)
    layer += (attended + 4 * intermediate) * _BF16
    inner = len(LORA_TARGETS) * size.lora_rank
    if workload.adapter_dtype == "float32":
        # q, k, v, gate and up take the width, o the heads, down the inner width; what only they need of the
        # bfloat16 tensors above, the inputs of two blocks and of down, is not kept beside its copies
        layer += (5 * hidden + head_width + intermediate + inner) * _FLOAT32 - (2 * hidden + intermediate) * _BF16
    else:
        layer += inner * _BF16
    if size.is_eager:
        # capped scores and probabilities, and these in float32 once more
        layer += size.num_heads * num_tokens * (_BF16 + _BF16 + _FLOAT32)
    layers = layer + size.num_layers * hidden * _BF16 if gradient_checkpointing else layer * size.num_layers
    logits = size.vocab_size * (_BF16 + _FLOAT32 + _FLOAT32)
    return num_tokens * (layers + logits)
