"""Say what training needs at full size: parameters, memory, operations, and the time of a step on a given GPU.

    python -m vlm3d_ext.engines.training_requirements --run encoder joint --gpu h100 --batch_size 8

The bundles' own train.json are made on the meta device and really run there, forward and backward, as a GPU would run
them: no weights, no data, no GPU, nothing downloaded. Options that are not this command's own replace knobs of the
configs. It ends with 0, or with 2 if an argument cannot be.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gpu_rates import EFFICIENCY, GPUS, GpuRates, gpu_rates
from .language_model_memory import GATHERED_LAYERS, NF4_BITS
from .operation_meter import Work
from .training_requirements_table import options_of, requirements_notes, requirements_table
from .training_runs import BUNDLES, RUNS, language_model_options, load_run
from .training_step_cost import StepCost, encoder_bytes_per_token, measure_training_step

__all__ = ["main", "training_requirements"]

_GIB = 2**30
# Fused AdamW reads weight, gradient and two moments and writes all but the gradient; clipping reads the gradient twice
# and writes it: ten times four bytes.
_OPTIMIZER_BYTES = 40
_MOST_GPUS = 64
_BF16 = 2


def training_requirements(
    run: str,
    gpu: GpuRates,
    num_gpus: int = 1,
    llm: str | None = None,
    options: Mapping[str, Any] | None = None,
    volume_size: Sequence[int] = (64, 512, 512),
    bundles: Path = BUNDLES,
) -> dict[str, Any]:
    """Return what one run needs, with each way of recomputing activations.

    Args:
        run: one of `vlm3d_ext.engines.training_runs.RUNS`.
        gpu: on which it is to run.
        num_gpus: how many, each with a whole batch and its own copy of the weights.
        llm: one of `language_model_options`, for runs with a language model; None takes the config's own.
        options: knobs of the config to replace.
        volume_size: (D, H, W) voxels of a prepared scan.
        bundles: the folder of the bundles.

    Raises:
        FileNotFoundError: if there are no bundles.
        ValueError: if a name or an option is unknown, or a number is out of range.
    """
    if num_gpus < 1 or num_gpus > _MOST_GPUS:
        raise ValueError(f"gpus must be from 1 to {_MOST_GPUS}, got {num_gpus}.")
    chosen: dict[str, Any] = {"world_size": num_gpus, **_language_model(llm, bundles), **(options or {})}
    # a run that is made with one layer says what its knobs are, at the least cost
    shipped = load_run(run, chosen, volume_size, 1, bundles)
    knobs = {name: shipped.knob(name) for name in ("batch_size", "accumulation_steps")}
    if knobs["batch_size"] < 1:
        raise ValueError(f"batch_size must be at least 1, got {knobs['batch_size']}.")
    ways = list(RUNS[run][2])
    own = {name: shipped.knob(name) for name in ways[0]}
    if own not in ways:
        ways.insert(0, own)
    has_model = shipped.num_layers is not None
    is_four_bit = has_model and shipped.knob("quantization") == "nf4"
    variants = []
    for way in ways:
        cost = measure_training_step(run, {**chosen, **way}, volume_size, bundles)
        saved = cost.quantized_parameters * (_BF16 - NF4_BITS / 8) if is_four_bit else 0.0
        shards = run in ("align", "rl") and not is_four_bit and num_gpus > 1
        variants.append(
            {"options": way, "is_shipped": way == own}
            | _memory(cost, saved, gpu, num_gpus if shards else 1)
            | _time(cost, gpu, knobs["accumulation_steps"])
        )
        if run == "encoder":
            variants[-1]["kept_bytes_per_token_layer_channel"] = encoder_bytes_per_token(
                {**chosen, **way}, volume_size, bundles
            )
    return {
        "run": run,
        "bundle": RUNS[run][0],
        "language_model": shipped.knob("language_model") if has_model else None,
        "volume_size": list(volume_size),
        **knobs,
        "num_gpus": num_gpus,
        "trained_parameters": round(cost.trained_parameters),
        "frozen_parameters": round(cost.frozen_parameters),
        "weights_gib": (cost.weight_bytes - saved) / _GIB,
        "gradients_gib": cost.trained_bytes / _GIB,
        "optimizer_gib": 2 * cost.trained_bytes / _GIB,
        "batch_gib": cost.batch_bytes / _GIB,
        "variants": variants,
        "advice": _advice(variants, knobs["batch_size"], gpu, run, is_four_bit),
    }


def _language_model(llm: str | None, bundles: Path) -> dict[str, Any]:
    if llm is None:
        return {}
    known = language_model_options(bundles)
    if llm not in known:
        raise ValueError(f"llm must be one of {', '.join(known)}, or all, got {llm!r}.")
    return known[llm]


def _memory(cost: StepCost, saved: float, gpu: GpuRates, num_shards: int) -> dict[str, Any]:
    total, usable = cost.total_bytes - saved, gpu.usable_bytes
    # what does not depend on the batch
    fixed = cost.weight_bytes - saved + 3 * cost.trained_bytes
    gathered = GATHERED_LAYERS * cost.layer_bytes / max(cost.num_layers, 1)

    def sharded(number: int) -> float:
        return total - cost.layer_bytes * (1 - 1 / number) + gathered if number > 1 else total

    enough = next((number for number in range(1, _MOST_GPUS + 1) if sharded(number) <= usable), None)
    return {
        "kept_gib": cost.kept_bytes / _GIB,
        "peak_gib": cost.peak_bytes / _GIB,
        "total_gib": total / _GIB,
        "four_bit_total_gib": (cost.total_bytes - cost.quantized_parameters * (_BF16 - NF4_BITS / 8)) / _GIB,
        "sharded_total_gib": sharded(num_shards) / _GIB if num_shards > 1 else None,
        "fits": total <= usable,
        "fits_sharded": num_shards > 1 and sharded(num_shards) <= usable,
        "gpus_to_shard_over": enough,
        "share_of_usable": total / usable,
        "largest_share_of_batch": (usable - fixed) / (total - fixed),
    }


def _time(cost: StepCost, gpu: GpuRates, accumulation_steps: int) -> dict[str, Any]:
    flops_per_s, bytes_per_s = gpu.tflops * 1e12, gpu.tb_per_s * 1e12
    optimizer = Work({(0.0, _OPTIMIZER_BYTES * cost.trained_parameters): 1})
    micro = Work()
    for work in cost.phases.values():
        micro = micro.plus(work)
    step = micro.times(accumulation_steps).plus(optimizer)

    def times(work: Work) -> dict[str, float]:
        return {
            "tflop": work.flops / 1e12,
            "tb_moved": work.bytes_moved / 1e12,
            "floor_ms": 1e3 * max(work.flops / flops_per_s, work.bytes_moved / bytes_per_s),
            "in_turn_ms": 1e3 * work.seconds(flops_per_s, bytes_per_s),
            "expected_ms": 1e3 * work.seconds(flops_per_s, bytes_per_s) / EFFICIENCY,
        }

    return {
        "phases": {name: times(work) for name, work in cost.phases.items()},
        "micro_batch": times(micro),
        "optimizer_step": times(step),
    }


def _advice(
    variants: Sequence[Mapping[str, Any]], batch_size: int, gpu: GpuRates, run: str, is_four_bit: bool
) -> list[str]:
    """Say what to change where the shipped way does not fit."""
    shipped = next(variant for variant in variants if variant["is_shipped"])
    if shipped["fits"] or shipped["fits_sharded"]:
        return []
    advice = []
    for variant in variants:
        if variant["fits"]:
            advice.append(f"fits with {options_of(variant)}: {variant['total_gib']:.1f} GiB")
    for variant in variants:
        smaller = int(batch_size * variant["largest_share_of_batch"])
        if not variant["fits"] and 1 <= smaller < batch_size:
            settings = " ".join(part for part in (options_of(variant), f"--batch_size {smaller}") if part)
            advice.append(f"about fits with {settings}; accumulation makes up for it")
    if run in ("align", "rl") and not is_four_bit:
        for variant in variants:
            number = variant["gpus_to_shard_over"]
            if not variant["fits"] and number:
                way = f" and {options_of(variant)}" if not variant["is_shipped"] else ""
                advice.append(f"fits on {number} GPUs with _overlays/fsdp.json{way}")
                break
    if run in ("align", "rl", "joint") and not is_four_bit:
        for variant in variants:
            if variant["four_bit_total_gib"] * _GIB <= gpu.usable_bytes:
                way = f" {options_of(variant)}" if not variant["is_shipped"] else ""
                advice.append(f"fits with --quantization nf4{way}: {variant['four_bit_total_gib']:.1f} GiB")
                break
    return advice or [f"nothing of what there is to change makes it fit {gpu.name}; take one with more memory"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code, 0 or 2."""
    chosen, others = _parser().parse_known_args(arguments)
    try:
        options = _knobs(others)
        gpu = gpu_rates(chosen.gpu, chosen.matrix_tflops, chosen.memory_tb_per_s, chosen.memory_gib)
        runs = list(RUNS) if "all" in chosen.run else chosen.run
        unknown = [run for run in runs if run not in RUNS]
        if unknown:
            raise ValueError(f"run must be one of {', '.join(RUNS)}, or all, got {unknown[0]!r}.")
        known = list(language_model_options(chosen.bundles))
        llms = known if "all" in chosen.llm else chosen.llm
        rows = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, about what a user of theirs might change
            for run in runs:
                for llm in llms if run in ("align", "rl", "joint") else [None]:
                    rows.append(
                        training_requirements(run, gpu, chosen.gpus, llm, options, chosen.volume_size, chosen.bundles)
                    )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(
            json.dumps(
                {"gpu": vars(gpu), "efficiency": EFFICIENCY, "notes": requirements_notes(gpu), "runs": rows}, indent=2
            )
        )
    else:
        print("\n\n".join([*(requirements_table(row, gpu) for row in rows), "\n".join(requirements_notes(gpu))]))
    return 0


def _knobs(others: Sequence[str]) -> dict[str, Any]:
    """Read ``--name value`` and ``--name=value``, values as MONAI's command line reads them."""
    options: dict[str, Any] = {}
    rest = list(others)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or rest):
            raise ValueError(f"expected --name value of a knob of the configs, got {name!r}.")
        value = value if equals else rest.pop(0)
        try:
            options[name[2:]] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name[2:]] = value
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm3d_ext.engines.training_requirements",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", nargs="+", default=["all"], metavar="NAME", help=f"{', '.join(RUNS)}, or all (default: all)")
    llm = "language models of the report_generation bundle's configs/llm, or all (default: the config's own)"
    add("--llm", nargs="+", default=[None], metavar="NAME", help=llm)
    add("--gpu", default="h200", help=f"{', '.join(GPUS)} (default: h200)")
    add("--gpus", type=int, default=1, help="how many (default: 1)")
    add("--matrix-tflops", type=float, help="sustained bfloat16 rate (default: of --gpu)")
    add("--memory-tb-per-s", type=float, help="sustained memory rate (default: of --gpu)")
    add("--memory-gib", type=float, help="memory of one GPU (default: of --gpu)")
    add("--volume-size", type=int, nargs=3, default=(64, 512, 512), metavar="N", help="voxels (default: 64 512 512)")
    add("--bundles", type=Path, default=BUNDLES, help="folder of the bundles (default: the checkout's)")
    add("--json", action="store_true", help="print JSON in place of tables")
    return parser


if __name__ == "__main__":
    sys.exit(main())
