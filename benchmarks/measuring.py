"""Two actions timed in turns, and how busy the rest of the machine was meanwhile."""

from __future__ import annotations

import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["MOST_LOAD_OF_OTHERS", "LoadOfOthers", "PairedTimes", "cpu_seconds", "time_pairs"]

# Of one core. CPU time is not waiting time, but neighbours take caches and memory bandwidth.
MOST_LOAD_OF_OTHERS = 0.3


@dataclass(frozen=True)
class PairedTimes:
    """CPU seconds of both sides, pair by pair.

    Args:
        ours: of our side.
        peer: of the other, as many.
        load: cores that other processes used meanwhile, on average.
    """

    ours: Sequence[float]
    peer: Sequence[float]
    load: float

    @property
    def ratio(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(self._ratios)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the pairs' ratios, as a share of their median."""
        lower, _, upper = statistics.quantiles(self._ratios, n=4, method="inclusive")
        return (upper - lower) / self.ratio

    @property
    def _ratios(self) -> list[float]:
        return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Return user and system seconds that an action takes in this process and in the children that end within it."""
    before = _used()
    action()
    return _used() - before


def time_pairs(
    ours: Callable[[int], Any],
    peer: Callable[[int], Any],
    repeats: int = 7,
    clock: str = "cpu",
    before: Callable[[], Any] | None = None,
) -> PairedTimes:
    """Time two actions in turns, after one unmeasured turn of each.

    Args:
        ours: gets the number of the pair, from 0, so that each can take files that are not in any cache of its own.
        peer: the same.
        repeats: measured pairs, at least 5.
        clock: ``"cpu"``, CPU seconds of this process and its ended children; ``"wall"``, for what runs elsewhere.
        before: done before each turn, and not measured, such as emptying a cache.

    Raises:
        ValueError: for fewer repeats or another clock.
    """
    if repeats < 5:
        raise ValueError(f"repeats must be at least 5, got {repeats}.")
    if clock not in ("cpu", "wall"):
        raise ValueError(f"clock must be 'cpu' or 'wall', got {clock!r}.")
    seconds = cpu_seconds if clock == "cpu" else _wall_seconds
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    ours(0)
    peer(0)
    load = LoadOfOthers()
    for number in range(repeats):
        # who comes first changes, so that neither always meets the other's warm caches
        sides = [("ours", ours), ("peer", peer)]
        for name, action in sides if number % 2 == 0 else sides[::-1]:
            gc.collect()
            if before is not None:
                before()
            times[name].append(seconds(lambda action=action, number=number: action(number)))  # type: ignore[misc]
    return PairedTimes(times["ours"], times["peer"], load.cores())


class LoadOfOthers:
    """How many cores were busy with other processes since this was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._time = _busy(), _used(), time.perf_counter()

    def cores(self) -> float:
        """Return the mean number of busy cores that this process and its ended children do not account for."""
        elapsed = time.perf_counter() - self._time
        return max(0.0, (_busy() - self._busy - (_used() - self._own)) / elapsed)


def _used() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _busy() -> float:
    times = psutil.cpu_times()._asdict()
    return sum(times.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))


def _wall_seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
