"""What a preparation would take in disk and time, told from one case."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np

from data_prep.case_preparation import one_line, prepare_volumes
from data_prep.preparation_run import CasePlan

__all__ = ["estimate"]


def estimate(plan: CasePlan, num_workers: int) -> bool:
    """Prepare the case of median file size in memory, and print what all of them would take; write nothing.

    Args:
        plan: what a run would do.
        num_workers: processes that the run would use.

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
    middle = len(by_size) // 2
    for task in by_size[middle:] + by_size[:middle]:
        start = time.perf_counter()
        try:
            volumes = prepare_volumes(task)
        except ValueError as error:
            print(f"refused {task.case.volume_id}: {one_line(error, task.hidden_paths)}")
            continue
        num_bytes = 0
        for volume in volumes:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, imgs=volume.imgs, gts=volume.gts)
            num_bytes += buffer.tell()
        seconds = time.perf_counter() - start
        total = len(plan.tasks)
        minutes = seconds * total / num_workers / 60
        print(
            f"{task.case.volume_id}: {num_bytes / 1e6:.2f} MB in {seconds:.2f} s; all {total} with {num_workers} "
            f"worker(s): "
            f"about {num_bytes * total / 1e6:.1f} MB, {minutes:.1f} minutes. Nothing was written."
        )
        return True
    print("no case could be prepared; nothing was written", file=sys.stderr)
    return False


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(child.stat().st_size for child in path.iterdir() if child.is_file())
    return path.stat().st_size
