"""Two ranks against one: what distributing a training costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from data_prep import prepare, synthesize

from .measuring import LoadOfOthers, PairedTimes
from .repository import BUNDLES, ROOT
from .row import ResultsDiffer, Row

__all__ = ["two_ranks"]

# Relative: additions in another order, grown by the steps of a short training.
LARGEST_DIFFERENCE = 1e-4
_LOOK_EVERY_S = 0.01


@dataclass(frozen=True)
class _EpochEnd:
    """CPU seconds of all processes of a training since its beginning, and the time, when an epoch was written."""

    cpu_s: float
    time_s: float


def two_ranks(
    num_patients: int = 48,
    size: Sequence[int] = (48, 112, 112),
    spatial_size: Sequence[int] = (32, 96, 96),
    num_cases: int = 48,
    global_batch_size: int = 8,
    epochs: int = 5,
    rounds: int = 2,
    options: Mapping[str, Any] | None = None,
) -> Row:
    """CPU time of a training sample in the demo's encoder on two gloo ranks, against one process of the same batch"""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _prepare(root, num_patients, size, spatial_size)
        shared = {
            "demo_dir": root,
            "max_cases": num_cases,
            "global_batch_size": global_batch_size,
            "epochs": epochs,
            # validation is left to other rows
            "validation_interval": epochs + 1,
            **(options or {}),
        }
        marks: dict[int, list[list[_EpochEnd]]] = {1: [], 2: []}
        difference = 0.0
        load = LoadOfOthers()
        for number in range(rounds):
            # who comes first changes
            order = (2, 1) if number % 2 == 0 else (1, 2)
            for num_ranks in order:
                run_dir = root / f"{num_ranks}_ranks_{number}"
                batch = {"batch_size": global_batch_size // num_ranks, "run_dir": run_dir}
                marks[num_ranks].append(_train(num_ranks, {**shared, **batch}))
            one, two = (root / f"{num_ranks}_ranks_{number}" for num_ranks in (1, 2))
            difference = max(difference, _difference(one, two))
        cores = load.cores()
    cpu = {num_ranks: _per_epoch([[end.cpu_s for end in run] for run in runs]) for num_ranks, runs in marks.items()}
    wall = {num_ranks: _per_epoch([[end.time_s for end in run] for run in runs]) for num_ranks, runs in marks.items()}
    return Row.of_times(
        "two_ranks",
        two_ranks.__doc__ or "",
        PairedTimes(cpu[2], cpu[1], cores),
        1.15,
        f"the losses of all {epochs} epochs differ by at most {difference:.1g} of their size",
        **{
            "time on the clock": sum(wall[2]) / sum(wall[1]),
            "size": f"epochs of {num_cases} cases of {tuple(spatial_size)}, steps of {global_batch_size}; the first "
            f"epoch, which reads the files, and starting are not counted",
        },
    )


def _prepare(root: Path, num_patients: int, size: Sequence[int], spatial_size: Sequence[int]) -> None:
    """Write a prepared data set to `root`/prepared, as the demo does."""
    raw = os.fspath(root / "raw")
    made = synthesize.main(
        ["--output", raw, "--num-train-patients", str(num_patients), "--num-valid-patients", "1", "--seed", "1"]
        + ["--size", *map(str, size)]
    )
    made = made or prepare.main(
        ["--source", raw, "--output", os.fspath(root / "prepared"), "--window", "lung", "soft_tissue"]
        + ["--spatial-size", *map(str, spatial_size), "--validation-fraction", "0.05"]
    )
    if made:
        raise RuntimeError(f"the data set could not be made (exit code {made}); its message is above")


def _train(num_ranks: int, options: Mapping[str, Any]) -> list[_EpochEnd]:
    """Train the demo's encoder and look from outside how much time has been used at the end of each epoch."""
    files = [BUNDLES / "encoder/configs/train.json", BUNDLES / "_overlays/demo.json"]
    start = [sys.executable]
    if num_ranks > 1:
        files.append(BUNDLES / "_overlays/ddp.json")
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    names = ",".join(f"'{name}'" for name in files)
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value).replace(" ", ""))]
    command = [*start, "-m", "monai.bundle", "run", "--config_file", f"[{names}]", *flags]
    run_dir = Path(options["run_dir"])
    run_dir.mkdir()
    history = run_dir / "output" / "history.json"
    ends: list[_EpochEnd] = []
    seen = 0
    with (run_dir / "messages.txt").open("w+", encoding="utf-8") as messages:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=messages, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                written = history.stat().st_mtime_ns if history.exists() else 0
                if written != seen:
                    seen = written
                    ends.append(_EpochEnd(_used_by_all(process.pid), time.perf_counter()))
                time.sleep(_LOOK_EVERY_S)
        finally:
            # the launcher ends its ranks when it is told to end
            process.terminate()
            process.wait()
        messages.seek(0)
        if process.returncode or len(ends) != options["epochs"]:
            raise RuntimeError(
                f"a training on {num_ranks} ranks ended with {process.returncode} after {len(ends)} of "
                f"{options['epochs']} epochs:\n{messages.read()[-9000:]}"
            )
    return ends


def _used_by_all(pid: int) -> float:
    """Return the CPU seconds of a process and all that it has started."""
    process = psutil.Process(pid)
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    return total


def _per_epoch(runs: Sequence[Sequence[float]]) -> list[float]:
    """Return what passed from each epoch's end to the next, of all runs one after the other."""
    return [end - begin for run in runs for begin, end in pairwise(run)]


def _difference(one: Path, two: Path) -> float:
    """Return the largest relative difference of the losses of two trainings.

    Raises:
        ResultsDiffer: if it is more than the order of additions makes.
    """
    largest = 0.0
    histories = [json.loads((run_dir / "output" / "history.json").read_text()) for run_dir in (one, two)]
    for ours, peer in zip(*histories, strict=True):
        if ours["iteration"] != peer["iteration"]:
            raise ResultsDiffer(f"epoch {ours['epoch']} has {ours['iteration']} steps and {peer['iteration']}")
        losses = [{"loss": row["loss"], **row["losses"]} for row in (ours, peer)]
        for name, value in losses[0].items():
            difference = abs(losses[1][name] - value) / abs(value)
            if not difference <= LARGEST_DIFFERENCE or math.isnan(difference):
                raise ResultsDiffer(
                    f"{name} of epoch {ours['epoch']} is {value} on one rank and {losses[1][name]} on two"
                )
            largest = max(largest, difference)
    return largest
