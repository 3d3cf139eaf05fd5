"""What GPUs compute and move per second, and how much memory they have."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EFFICIENCY", "GPUS", "USABLE_SHARE", "GpuRates", "gpu_rates"]

# Sustained on one H200 by large bfloat16 matrix products and copies, against what is published of it.
_MEASURED_TFLOPS, _PUBLISHED_TFLOPS = 790, 989
_MEASURED_TB_PER_S, _PUBLISHED_TB_PER_S = 4.3, 4.8
# What is left of a GPU beside the CUDA context and what the allocator cannot use.
USABLE_SHARE = 0.9
# Share of the sustained rates that training is taken to reach operation by operation: small products, attention and
# launches fall short of large products. An assumption, not a measurement.
EFFICIENCY = 0.8

# name -> memory in GiB as its driver reports it, published dense bfloat16 TFLOP/s, published memory TB/s
GPUS: dict[str, tuple[float, float, float]] = {
    "b200": (178, 2250, 8.0),
    "h200": (139, 989, 4.8),
    "h100": (79, 989, 3.35),
    "a100": (79, 312, 2.04),
    "a100_40gb": (39, 312, 1.56),
    "l40s": (44, 362, 0.864),
    "rtx4090": (23.5, 165, 1.008),
    "rtx3090": (23.5, 71, 0.936),
}


@dataclass(frozen=True)
class GpuRates:
    """A GPU, or several alike.

    Attributes:
        name: for people.
        memory_gib: of one.
        tflops: bfloat16, sustained.
        tb_per_s: of memory, sustained.
        source: where the rates come from.
    """

    name: str
    memory_gib: float
    tflops: float
    tb_per_s: float
    source: str

    def __post_init__(self) -> None:
        for field in ("memory_gib", "tflops", "tb_per_s"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} of a GPU must be positive, got {getattr(self, field):g}.")

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU that training can have."""
        return USABLE_SHARE * self.memory_gib * 2**30


def gpu_rates(
    name: str = "h200",
    matrix_tflops: float | None = None,
    memory_tb_per_s: float | None = None,
    memory_gib: float | None = None,
) -> GpuRates:
    """Return the rates of a GPU: published ones times what an H200 was measured to reach of its own.

    Args:
        name: one of `GPUS`.
        matrix_tflops: sustained rate of bfloat16 products to take in place of the table's.
        memory_tb_per_s: likewise, of memory.
        memory_gib: likewise.

    Raises:
        ValueError: if there is no such GPU, or a number is not positive.
    """
    if name not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}; or give its rates and memory.")
    memory, tflops, bandwidth = GPUS[name]
    reached = _MEASURED_TFLOPS / _PUBLISHED_TFLOPS, _MEASURED_TB_PER_S / _PUBLISHED_TB_PER_S
    if matrix_tflops is not None and memory_tb_per_s is not None:
        source = "as given"
    elif name == "h200":
        source = f"measured, {reached[0]:.2f} and {reached[1]:.2f} of what is published"
    else:
        source = (
            f"not measured: published dense bfloat16 {tflops:g} TFLOP/s and {bandwidth:g} TB/s times what an H200 was "
            f"measured to reach of its own, {_MEASURED_TFLOPS} / {_PUBLISHED_TFLOPS} and "
            f"{_MEASURED_TB_PER_S} / {_PUBLISHED_TB_PER_S}"
        )
    return GpuRates(
        name,
        memory if memory_gib is None else memory_gib,
        tflops * reached[0] if matrix_tflops is None else matrix_tflops,
        bandwidth * reached[1] if memory_tb_per_s is None else memory_tb_per_s,
        source,
    )
