"""What a preparation would take in disk, time and memory, told from a few cases of different sizes."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from data_prep.case_preparation import CaseTask, prepare_case
from data_prep.memory_need import GIB, memory_need_bytes, memory_refusal
from data_prep.preparation_run import CasePlan

__all__ = ["Forecast", "estimate", "forecast"]

_NUM_SAMPLES = 5


@dataclass(frozen=True)
class Forecast:
    """What all cases take together.

    Args:
        total: if each case takes what the measured cases next to it in file size suggest, between the two in
            proportion.
        lowest: if each takes the less of those two.
        highest: if each takes the more of them.
    """

    total: float
    lowest: float
    highest: float


def forecast(sizes: Sequence[int], sample_sizes: Sequence[int], sample_values: Sequence[float]) -> Forecast:
    """Carry what was measured on a few cases over to all of them.

    Args:
        sizes: file sizes of all cases.
        sample_sizes: those of the measured cases, ascending; smaller and larger cases count as the first and the last.
        sample_values: what was measured.
    """
    wanted, known, values = (np.asarray(numbers, dtype=np.float64) for numbers in (sizes, sample_sizes, sample_values))
    after = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    # A case of exactly a measured size takes what was measured, and is no cause of doubt.
    before = np.where(known[after] > wanted, np.maximum(after - 1, 0), after)
    pair = values[np.stack([before, after])]
    return Forecast(
        float(np.interp(wanted, known, values).sum()),
        float(pair.min(axis=0).sum()),
        float(pair.max(axis=0).sum()),
    )


def estimate(plan: CasePlan, num_workers: int, output: Path, max_memory_bytes: int | None = None) -> bool:
    """Prepare up to five cases, spread over the file sizes, into a temporary folder, and print what all would take.

    Args:
        plan: what a run would do.
        num_workers: processes that the run would use.
        output: folder that the run would write to; not touched.
        max_memory_bytes: what a worker may use; None for no limit.

    Returns:
        False if no case could be prepared.
    """
    statuses = [outcome.status for outcome in plan.outcomes]
    print(
        f"{len(plan.tasks)} to prepare, {statuses.count('excluded')} excluded, {statuses.count('refused')} "
        f"refused by name or table"
    )
    for remark in plan.remarks:
        print(f"note: {remark}")
    by_size = sorted(plan.tasks, key=lambda task: _size(task.case.path))
    sizes = [_size(task.case.path) for task in by_size]
    samples = []
    for index, num_bytes, seconds in _measured(by_size, max_memory_bytes):
        need = memory_need_bytes(by_size[index])
        print(
            f"{by_size[index].case.volume_id}: {sizes[index] / 1e6:.2f} MB become {num_bytes / 1e6:.2f} MB in "
            f"{seconds:.2f} s" + (f", with at most {need / GIB:.2f} GiB of memory" if need is not None else "")
        )
        samples.append((sizes[index], num_bytes, seconds))
    if not samples:
        print("no case could be prepared; nothing was written", file=sys.stderr)
        return False
    samples.sort()
    known, measured_bytes, measured_seconds = zip(*samples, strict=True)
    disk = forecast(sizes, known, measured_bytes)
    minutes = forecast(sizes, known, [seconds / num_workers / 60 for seconds in measured_seconds])
    print(
        f"all {len(sizes)} with {num_workers} worker(s): about {_range(disk, 1e6, '.1f')} MB and "
        f"{_range(minutes, 1, '.1f')} minutes. Nothing was written to {output}."
    )
    _print_memory(plan.tasks, num_workers, max_memory_bytes)
    _print_free_space(output, disk)
    return True


def _measured(by_size: Sequence[CaseTask], max_memory_bytes: int | None) -> Iterator[tuple[int, int, float]]:
    """Yield (index, bytes written, seconds) of cases spread over the list; a refused one gives way to the next."""
    tried: set[int] = set()
    for wanted in np.linspace(0, len(by_size) - 1, min(_NUM_SAMPLES, len(by_size))).round().astype(int).tolist():
        for index in sorted(set(range(len(by_size))) - tried, key=lambda index: abs(index - wanted)):
            tried.add(index)
            task = by_size[index]
            reason = memory_refusal(task, max_memory_bytes) if max_memory_bytes is not None else None
            if reason is None:
                with tempfile.TemporaryDirectory() as name, threadpool_limits(limits=1):
                    start = time.perf_counter()
                    outcome = prepare_case(replace(task, output=Path(name)))
                    seconds = time.perf_counter() - start
                    num_bytes = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
                if outcome.status == "prepared":
                    yield index, num_bytes, seconds
                    break
                reason = outcome.reason
            print(f"refused {task.case.volume_id}: {reason}")


def _print_memory(tasks: Sequence[CaseTask], num_workers: int, max_memory_bytes: int | None) -> None:
    if max_memory_bytes is None:
        return
    needs = [need for task in tasks if (need := memory_need_bytes(task)) is not None]
    too_large = sum(need > max_memory_bytes for need in needs)
    within = max((need for need in needs if need <= max_memory_bytes), default=0)
    print(
        f"memory: {too_large} would be refused, needing more than {max_memory_bytes / GIB:.2f} GiB (the largest "
        f"{max(needs, default=0) / GIB:.2f}); the others need at most {within / GIB:.2f} GiB each, "
        f"{num_workers * within / GIB:.2f} GiB for {num_workers} worker(s)"
    )


def _print_free_space(output: Path, disk: Forecast) -> None:
    existing = next(folder for folder in (output, *output.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    print(f"disk: {free / 1e6:.1f} MB are free there")
    if free < disk.highest:
        print(
            f"warning: --output {output}: {free / 1e6:.1f} MB are free, up to {disk.highest / 1e6:.1f} MB will be "
            "needed; free space, or choose another --output.",
            file=sys.stderr,
        )


def _range(value: Forecast, unit: float, form: str) -> str:
    return f"{value.total / unit:{form}} ({value.lowest / unit:{form}} to {value.highest / unit:{form}})"


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(child.stat().st_size for child in path.iterdir() if child.is_file())
    return path.stat().st_size
