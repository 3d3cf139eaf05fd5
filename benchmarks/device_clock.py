"""Time on a device, and the rates that the device itself reaches, to which all times on it are compared."""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .row import Row

__all__ = [
    "DeviceClock",
    "MachineRates",
    "available",
    "device_row",
    "measure_rates",
    "middle_and_spread",
    "step_seconds",
    "synchronize",
]

_MATRIX_SIZE = 8192
_COPIED_BYTES = 2**31
_SECONDS = 2.0
_CALLS_AT_A_TIME = 10


class DeviceClock:
    """Marks moments of a device's work, and tells the seconds between them.

    On CUDA the marks are events in the current stream, so that the host need not wait; elsewhere the host's clock.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Mark this moment."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next, after all work is done."""
        synchronize(self.device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return [one.elapsed_time(other) / 1e3 for one, other in pairs]
        return [other - one for one, other in pairs]


def synchronize(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_seconds(
    step: Callable[[], Any], device: str | torch.device, num_steps: int = 10, num_warm_up: int = 3
) -> list[float]:
    """Return the seconds of each step, after some that are not measured."""
    for _ in range(num_warm_up):
        step()
    clock = DeviceClock(device)
    clock.mark()
    for _ in range(num_steps):
        step()
        clock.mark()
    return clock.seconds()


def middle_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median, and the distance between the quartiles as a share of it."""
    middle = statistics.median(seconds)
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return middle, (upper - lower) / middle


@dataclass(frozen=True)
class MachineRates:
    """What a device sustains.

    Args:
        matrix_tflops: of large bfloat16 matrix products.
        copy_tb_s: terabytes read and written per second by a copy on the device.
        host_to_device_gb_s: gigabytes per second from pinned memory of the host.
    """

    matrix_tflops: float
    copy_tb_s: float
    host_to_device_gb_s: float

    def figures(self) -> dict[str, str]:
        """Return them as figures of a row."""
        return {
            "matrix products here": f"{self.matrix_tflops:.4g} TFLOP/s in bf16",
            "copying here": f"{self.copy_tb_s:.3g} TB/s read and written",
            "host to device here": f"{self.host_to_device_gb_s:.3g} GB/s",
        }


def measure_rates(
    device: str | torch.device,
    matrix_size: int = _MATRIX_SIZE,
    copied_bytes: int = _COPIED_BYTES,
    seconds: float = _SECONDS,
) -> MachineRates:
    """Measure a device's rates, each for some seconds.

    Args:
        device: where.
        matrix_size: rows and columns of the matrices.
        copied_bytes: of the tensors that are copied.
        seconds: at least, for each rate.
    """
    device = torch.device(device)
    one, other = torch.randn(2, matrix_size, matrix_size, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(one)
    products = _calls_per_second(lambda: torch.mm(one, other, out=product), device, seconds)
    source = torch.zeros(copied_bytes, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copies = _calls_per_second(lambda: target.copy_(source), device, seconds)
    pinned = torch.zeros(copied_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    moves = _calls_per_second(lambda: target.copy_(pinned, non_blocking=True), device, seconds)
    return MachineRates(
        2 * matrix_size**3 * products / 1e12, 2 * copied_bytes * copies / 1e12, copied_bytes * moves / 1e9
    )


def _calls_per_second(action: Callable[[], Any], device: torch.device, seconds: float) -> float:
    action()
    synchronize(device)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        for _ in range(_CALLS_AT_A_TIME):
            action()
        synchronize(device)
        count += _CALLS_AT_A_TIME
    return count / elapsed


def available() -> bool:
    """Whether rows that need CUDA can run here."""
    return torch.cuda.is_available()


def device_row(target: float | None) -> Callable[[Callable[..., Row]], Callable[..., Row]]:
    """Make a row of a function that measures on ``device``, ``"cuda"`` unless given.

    The row is refused, with all sizes, where there is no such device or its memory is not enough.

    Args:
        target: of the row.
    """

    def decorate(measure: Callable[..., Row]) -> Callable[..., Row]:
        @functools.wraps(measure)
        def row(**options: Any) -> Row:
            given = inspect.signature(measure).bind(**options)
            given.apply_defaults()
            sizes = ", ".join(f"{name} {value}" for name, value in given.arguments.items())
            if given.arguments["device"] == "cuda" and not available():
                return _refused("there is no CUDA device here")
            try:
                return measure(**options)
            except torch.OutOfMemoryError:
                return _refused(f"the device's memory is not enough for {sizes}; make them smaller, or take another")

        def _refused(reason: str) -> Row:
            return Row(measure.__name__, measure.__doc__ or "", None, target, "", refused=reason)

        return row

    return decorate
