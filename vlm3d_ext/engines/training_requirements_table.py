"""What `vlm3d_ext.engines.training_requirements` returns, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .gpu_rates import EFFICIENCY, GpuRates

__all__ = ["options_of", "requirements_notes", "requirements_table"]


def requirements_table(row: Mapping[str, Any], gpu: GpuRates) -> str:
    """Return one run as a table: a line for each way of recomputing activations, and advice."""
    what = row["language_model"] or f"bundle {row['bundle']}"
    size = " x ".join(str(n) for n in row["volume_size"])
    lines = [
        f"{row['run']}: {what}; {row['num_gpus']} x {gpu.name}, batch {row['batch_size']} of {size}, "
        f"{row['accumulation_steps']} micro-batch(es) a step",
        f"  parameters: {row['trained_parameters']:,} trained, {row['frozen_parameters']:,} frozen",
        f"  GiB: weights {row['weights_gib']:.2f}, gradients {row['gradients_gib']:.2f}, AdamW "
        f"{row['optimizer_gib']:.2f}, batch {row['batch_gib']:.2f}",
        f"  {'':<40}{'kept':>8}{'peak':>8}{'total':>8}  fits{'TFLOP':>9}{'TB':>8}{'floor':>9}{'expected':>10}"
        f"{'a step':>10}",
    ]
    for variant in row["variants"]:
        names = ", ".join(f"{name.split('_')[0]} {value}" for name, value in variant["options"].items()) or "as shipped"
        micro, step = variant["micro_batch"], variant["optimizer_step"]
        fits = "yes" if variant["fits"] else "shard" if variant["fits_sharded"] else "no"
        lines.append(
            f"  {('* ' if variant['is_shipped'] else '  ') + names:<40}{variant['kept_gib']:>8.1f}"
            f"{variant['peak_gib']:>8.1f}{variant['total_gib']:>8.1f}  {fits:>4}{micro['tflop']:>9.1f}"
            f"{micro['tb_moved']:>8.2f}{micro['floor_ms']:>6.0f} ms{micro['expected_ms']:>7.0f} ms"
            f"{step['expected_ms'] / 1e3:>8.2f} s"
        )
    shipped = next(variant for variant in row["variants"] if variant["is_shipped"])
    phases = (f"{name} {one['tflop']:.1f} in {one['expected_ms']:.0f} ms" for name, one in shipped["phases"].items())
    lines.append(f"  TFLOP of *: {', '.join(phases)}")
    per_token = {
        options_of(variant).split()[-1]: variant["kept_bytes_per_token_layer_channel"]
        for variant in row["variants"]
        if "kept_bytes_per_token_layer_channel" in variant
    }
    if per_token:
        each = ", ".join(f"{way} {size:.1f}" for way, size in per_token.items())
        lines.append(f"  bytes kept per token, layer and channel: {each}")
    return "\n".join([*lines, *(f"  {line}" for line in row["advice"])])


def requirements_notes(gpu: GpuRates) -> list[str]:
    """Return what the numbers mean."""
    return [
        f"{gpu.name}: {gpu.tflops:.0f} TFLOP/s bfloat16, {gpu.tb_per_s:.2f} TB/s ({gpu.source}); "
        f"{gpu.memory_gib:g} GiB, of which 90 % are taken as usable",
        "* as the config has it, or as the options say. Counted for one micro-batch on one GPU; every case has "
        "everything, and texts are as long as they may be",
        "kept: what the forward pass leaves for the backward pass, results included. peak: the most beside weights, "
        "gradients, moments and batch. total: all together",
        "floor: the longer of all operations at the matrix rate and all bytes at the memory rate, each operation "
        "reading and writing its tensors once",
        f"expected: operations one after the other, each the longer of both, over {EFFICIENCY:g}, an assumed "
        "efficiency; launches, loading and exchange between GPUs are not in it",
        "a step: all micro-batches of an optimizer step, clipping and fused AdamW",
    ]


def options_of(variant: Mapping[str, Any]) -> str:
    """Return the options that make a run so."""
    return " ".join(f"--{name} {value}" for name, value in variant["options"].items())
