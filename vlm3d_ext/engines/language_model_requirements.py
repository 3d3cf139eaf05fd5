"""Say what the language models of report generation need: parameters, memory, GPUs.

    python -m vlm3d_ext.engines.language_model_requirements --configuration all --gpu-memory-gib 80

Parameters are counted on models without storage, so that nothing is downloaded and no GPU is needed. Memory is an
estimate, by formulas that the output states; sizes are of one GPU with the whole workload. It ends with 0, or with 2
if an argument cannot be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..networks.blocks import VisionToLLMProjector
from .language_model_memory import (
    ADAPTER_BYTES,
    GATHERED_LAYERS,
    NF4_BITS,
    PHASES,
    PRECISIONS,
    LanguageModelSize,
    Workload,
    estimate_phase,
    measure_language_model,
)

__all__ = ["available_language_models", "language_model_requirements", "load_architecture", "main"]

_FOLDER = Path(__file__).parents[1] / "text" / "language_models"
_GIB = 2**30
_LORA_ALPHA = 128
_VISION_CHANNELS = 768
_DEFAULT_RANK = 64
# What the design that these configurations follow gives: its letter, the rank, and the adapters' parameters.
_DESIGN = {
    "llama_3_1_70b": ("A", 64, 325_000_000),
    "gemma_2_27b": ("B", 64, 120_000_000),
    "llama_3_1_8b": ("C", 32, 40_000_000),
}
_FORMULAS = (
    f"weights: bf16 2 B each; nf4 {NF4_BITS:.3f} bit each in linear layers, embeddings, head and norms 2 B",
    "adapters: weight, gradient and two AdamW moments of the same type, {adapter_bytes} B per parameter",
    "projector: 16 B per parameter in align, where it is trained; 4 B in rl",
    "KV cache: 2 x layers x key-value heads x head width x 2 B x tokens x sequences, tokens up to a layer's window",
    "activations per token and layer: 6 B x norms x hidden + 2 B x (2 x (heads + key-value heads) x head width + 4 x",
    "  intermediate) + 8 B x heads x tokens where attention logits are capped; for adapters in bfloat16 + 2 B x 7 x",
    "  rank, in float32 + 4 B x (5 x hidden + heads x head width + intermediate + 7 x rank) - 2 B x (2 x hidden +",
    "  intermediate); with checkpointing one such layer and 2 B x hidden for each; logits 10 B x vocabulary per token",
    "total: weights + adapters + projector + the larger of KV cache and activations",
    "GPUs: 90 % of each usable, each with its own workload; bf16: transformer layers sharded over all, and of",
    "  {gathered_layers} layers the gathered weights; embeddings, head, adapters and projector whole on each; nf4: not",
    "  sharded; none: not even so",
)


def available_language_models() -> list[str]:
    """Return the names of the configurations that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load_architecture(configuration: str) -> tuple[str, dict[str, Any]]:
    """Return the name on the Hugging Face hub and the config of a configuration.

    Raises:
        ValueError: if there is no such configuration.
    """
    if configuration not in available_language_models():
        raise ValueError(f"configuration must be one of {available_language_models()} or 'all', got {configuration!r}.")
    content = json.loads((_FOLDER / f"{configuration}.json").read_text())
    return content["name"], content["config"]


def language_model_requirements(
    configuration: str, workload: Workload, lora_rank: int | None = None, gpu_memory_gib: float = 80
) -> dict[str, Any]:
    """Count parameters and estimate memory of one configuration.

    Args:
        configuration: one of `available_language_models`.
        workload: of one GPU.
        lora_rank: of the adapters; None takes the design's.
        gpu_memory_gib: memory of one GPU in GiB.

    Returns:
        What ``--json`` prints for it; memory in GiB, ``num_gpus`` None where no number of GPUs is enough.

    Raises:
        ValueError: if the configuration is unknown or a number is out of range.
    """
    if gpu_memory_gib <= 0:
        raise ValueError(f"gpu_memory_gib must be positive, got {gpu_memory_gib:g}.")
    name, config = load_architecture(configuration)
    letter, designed_rank, claimed = _DESIGN.get(configuration, (None, _DEFAULT_RANK, None))
    size = measure_language_model(config, designed_rank if lora_rank is None else lora_rank, _LORA_ALPHA)
    if workload.projector_parameters is None:
        workload = replace(workload, projector_parameters=_projector_parameters(size.hidden_size))
    lora: dict[str, Any] = {"rank": size.lora_rank, "alpha": _LORA_ALPHA, "parameters": size.lora_parameters}
    if claimed is not None:
        lora |= {"claimed_parameters": claimed, "rank_for_claim": claimed / (size.lora_parameters / size.lora_rank)}
    return {
        "configuration": configuration,
        "letter": letter,
        "name": name,
        "base_parameters": size.base_parameters,
        "lora": lora,
        "projector_parameters": workload.projector_parameters,
        "memory": [
            _row(size, workload, phase, precision, checkpointing, gpu_memory_gib * _GIB)
            for phase in PHASES
            for precision in PRECISIONS
            for checkpointing in (True, False)
        ],
    }


def _projector_parameters(hidden_size: int) -> int:
    with torch.device("meta"):
        projector = VisionToLLMProjector(_VISION_CHANNELS, hidden_size)
    return sum(weight.numel() for weight in projector.parameters())


def _row(
    size: LanguageModelSize, workload: Workload, phase: str, precision: str, checkpointing: bool, gpu_bytes: float
) -> dict[str, Any]:
    memory = estimate_phase(size, workload, phase, precision, checkpointing)
    parts = {part: getattr(memory, part) / _GIB for part in ("weights", "trained", "kv_cache", "activations", "total")}
    row = {"phase": phase, "precision": precision, "gradient_checkpointing": checkpointing}
    return row | parts | {"num_gpus": memory.num_gpus(gpu_bytes)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    options = _parser().parse_args(arguments)
    try:
        workload = Workload(
            options.batch_size,
            options.num_samples,
            options.prompt_tokens,
            options.max_new_tokens,
            options.adapter_dtype,
            options.projector_parameters,
        )
        chosen = available_language_models() if "all" in options.configuration else options.configuration
        rows = [
            language_model_requirements(name, workload, options.lora_rank, options.gpu_memory_gib) for name in chosen
        ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {"adapter_bytes": ADAPTER_BYTES[workload.adapter_dtype], "gathered_layers": GATHERED_LAYERS}
    formulas = [line.format(**figures) for line in _FORMULAS]
    if options.json:
        workload_and_gpu = asdict(workload) | {"gpu_memory_gib": options.gpu_memory_gib}
        print(json.dumps({"workload": workload_and_gpu, "formulas": formulas, "configurations": rows}, indent=2))
    else:
        print("\n\n".join([*(_format(row, options.gpu_memory_gib) for row in rows), _notes(workload, formulas)]))
    return 0


def _format(row: dict[str, Any], gpu_memory_gib: float) -> str:
    lora, projector = row["lora"], row["projector_parameters"]
    lines = [
        f"{row['configuration']}: {row['name']}" + (f" (configuration {row['letter']})" if row["letter"] else ""),
        f"  base parameters      {row['base_parameters']:>15,}",
        f"  LoRA parameters      {lora['parameters']:>15,}  rank {lora['rank']}, alpha {lora['alpha']}",
    ]
    if "claimed_parameters" in lora:
        lines.append(
            f"    the design's {lora['claimed_parameters'] / 1e6:.0f}M does not follow from this rank: "
            f"it would be rank {lora['rank_for_claim']:.1f}"
        )
    lines.append(f"  projector parameters {projector:>15,}")
    head = "".join(f"{title:>13}" for title in ("weights", "trained", "KV cache", "activations", "total"))
    lines.append(f"  {'GiB, at the peak':<32}{head}{f'GPUs of {gpu_memory_gib:g}':>13}")
    for memory in row["memory"]:
        what = f"{memory['phase']:<6}{memory['precision']:<6}"
        what += "with checkpointing" if memory["gradient_checkpointing"] else "no checkpointing"
        parts = "".join(f"{memory[part]:>13.1f}" for part in ("weights", "trained", "kv_cache", "activations", "total"))
        lines.append(f"  {what:<32}{parts}{memory['num_gpus'] or 'none':>13}")
    return "\n".join(lines)


def _notes(workload: Workload, formulas: Sequence[str]) -> str:
    return "\n".join(
        [
            f"per GPU {workload.batch_size} x {workload.num_tokens} tokens ({workload.prompt_tokens} prompt, "
            f"{workload.max_new_tokens} new), x {workload.num_samples} samples in rl; estimates:",
            *(f"  {line}" for line in formulas),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.language_model_requirements",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = ", ".join(available_language_models())
    add("--configuration", nargs="+", default=["all"], metavar="NAME", help=f"{names}, or all (default: all)")
    add("--lora-rank", type=int, help="rank of the adapters (default: the design's, 64 or 32)")
    add("--batch-size", type=int, default=1, help="cases on a GPU at a time (default: 1)")
    add("--num-samples", type=int, default=4, help="reports generated of a case in rl (default: 4)")
    add("--prompt-tokens", type=int, default=512, help="visual prefix and words before the report (default: 512)")
    add("--max-new-tokens", type=int, default=512, help="tokens of a report (default: 512)")
    add("--adapter-dtype", default="float32", help="of adapters and their optimizer: float32 (default) or bfloat16")
    add("--projector-parameters", type=int, help="of the image projector (default: counted)")
    add("--gpu-memory-gib", type=float, default=80, help="memory of one GPU (default: 80)")
    add("--json", action="store_true", help="print JSON in place of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
