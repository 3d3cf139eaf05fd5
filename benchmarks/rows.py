"""All rows, in the order of the table; the modules are imported when a row is wanted."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .row import Row

__all__ = ["CPU_ROWS", "GPU_ROWS", "load_row"]

_MODULES = {
    "encoder_rows": ("encoder_flops", "encoder_saved_bytes", "encoder_forward", "encoder_against_vit"),
    "localizer_rows": (
        "localizer_diseases",
        "localizer_against_attention_unet",
        "localizer_peers",
        "localizer_time",
    ),
    "report_rows": ("projector_with_pooling", "generation_16_samples", "policy_step_packed"),
    "loading_rows": (
        "loading_chunked",
        "loading_npz",
        "loading_against_read",
        "patch_read",
        "patch_read_cached",
        "chunked_size",
    ),
    "preparation_rows": ("preparation", "preparation_whole_case"),
    "rank_rows": ("two_ranks",),
    "scaling_rows": ("scaling_slices", "scaling_voxels", "scaling_loading", "scaling_preparation", "scaling_planning"),
}
_GPU_MODULES = {
    "gpu_rows": (
        "machine_rates",
        "gpu_encoder_step",
        "gpu_localizer_step",
        "gpu_joint_step",
        "gpu_grpo_step",
        "gpu_loading_exposed",
    ),
}

CPU_ROWS = {name: module for module, names in _MODULES.items() for name in names}
GPU_ROWS = {name: module for module, names in _GPU_MODULES.items() for name in names}


def load_row(name: str) -> Callable[[], Row]:
    """Return the function of a row.

    Raises:
        KeyError: if there is no such row.
    """
    module = {**CPU_ROWS, **GPU_ROWS}[name]
    function: Callable[[], Row] = getattr(import_module(f"benchmarks.{module}"), name)
    return function
