"""How a cost grows with the size of the task: the exponent b of cost = a · size^b."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .measuring import MOST_LOAD_OF_OTHERS, LoadOfOthers, cpu_seconds
from .row import Row

__all__ = ["MOST_EXPONENT", "Growth", "fitted_exponent", "growth_row", "quadratic_share", "time_growth"]

# 1 is linear. What is paid once makes it smaller; a tenth more is 23 % over a factor of 8.
MOST_EXPONENT = 1.1

# Of malloc.h: when freed memory goes back to the system, and how many allocations get pages of their own.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_LARGEST_INT = 2**31 - 1


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return b of the least-squares fit log(cost) = a + b · log(size)."""
    slope, _ = statistics.linear_regression([math.log(n) for n in sizes], [math.log(cost) for cost in costs])
    return slope


@dataclass(frozen=True)
class Growth:
    """What a task cost at several sizes.

    Args:
        sizes: of the task, ascending.
        costs: for each round the costs of all sizes; counts need one round only.
        unit: of the costs.
        load: cores that other processes used meanwhile, on average; None for counts.
    """

    sizes: Sequence[int]
    costs: Sequence[Sequence[float]]
    unit: str = "s"
    load: float | None = None

    @property
    def exponent(self) -> float:
        """Median of the rounds' exponents."""
        return statistics.median(self._exponents)

    @property
    def spread(self) -> float | None:
        """Distance between the quartiles of the rounds' exponents, as a share of their median; None for counts."""
        if len(self.costs) < 2:
            return None
        lower, _, upper = statistics.quantiles(self._exponents, n=4, method="inclusive")
        return (upper - lower) / self.exponent

    @property
    def cost_by_size(self) -> dict[str, str]:
        """Size -> median cost, with its unit."""
        medians = [statistics.median(costs) for costs in zip(*self.costs, strict=True)]
        return {str(size): f"{cost:.3g} {self.unit}" for size, cost in zip(self.sizes, medians, strict=True)}

    @property
    def _exponents(self) -> list[float]:
        return [fitted_exponent(self.sizes, costs) for costs in self.costs]


def time_growth(action: Callable[[int, int], Any], sizes: Sequence[int], rounds: int = 5) -> Growth:
    """Time an action at several sizes, round by round, after an unmeasured turn at the largest and at the smallest.

    Freed memory stays with this process from now on: glibc gives each tensor of more than 32 MB fresh pages and takes
    them back at once. That makes large ones dearer once and for all, by a factor of 1.3 in the encoder, which a fit
    across the threshold would take for a part of the exponent.

    Args:
        action: gets the size and the number of the round, -1 in the unmeasured turn.
        sizes: ascending.
        rounds: at least 3.

    Raises:
        ValueError: for fewer rounds.
    """
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3, got {rounds}.")
    _keep_freed_memory()
    for size in (sizes[-1], sizes[0]):
        action(size, -1)
    gc.collect()
    # what is there already is not looked through again before each turn
    gc.freeze()
    try:
        load = LoadOfOthers()
        costs = []
        for number in range(rounds):
            order = sizes if number % 2 == 0 else sizes[::-1]
            seconds = {}
            for size in order:
                gc.collect()
                seconds[size] = cpu_seconds(lambda size=size, number=number: action(size, number))  # type: ignore[misc]
            costs.append([seconds[size] for size in sizes])
        return Growth(sizes, costs, load=load.cores())
    finally:
        gc.unfreeze()


def _keep_freed_memory() -> None:
    # other C libraries than glibc have other rules, and no such function
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)


def quadratic_share(sizes: Sequence[int], counts: Sequence[int]) -> float | None:
    """Return which share of the largest count is c · size² of the polynomial of degree two through the counts.

    Args:
        sizes: four, ascending.
        counts: exact, one for each size.

    Returns:
        The share, or None if no polynomial of degree two gives all four counts.
    """
    x0, x1, x2, x3 = (Fraction(size) for size in sizes)
    y0, y1, y2, y3 = (Fraction(count) for count in counts)
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    square = (second - first) / (x2 - x0)
    expected = y0 + first * (x3 - x0) + square * (x3 - x0) * (x3 - x1)
    return float(square * x3**2 / y3) if expected == y3 else None


def growth_row(name: str, what: str, series: Mapping[str, Growth], equality: str, **figures: Any) -> Row:
    """Return the row of one or several costs over size, whose ratio is the largest exponent.

    Args:
        name: of the benchmark.
        what: in words.
        series: name -> growth.
        equality: what was found equal.
        figures: further ones.
    """
    steepest = max(series.values(), key=lambda growth: growth.exponent)
    loads = [growth.load for growth in series.values() if growth.load is not None]
    load = max(loads) if loads else None
    refused = ""
    if load is not None and load > MOST_LOAD_OF_OTHERS:
        refused = (
            f"other processes used {load:.2f} cores, at most {MOST_LOAD_OF_OTHERS:g} allowed; stop them and run it "
            f"again"
        )
    exponents = {f"{part}, exponent": growth.exponent for part, growth in series.items()}
    costs = {f"{part}, cost of": growth.cost_by_size for part, growth in series.items()}
    return Row(
        name,
        what,
        None if refused else steepest.exponent,
        MOST_EXPONENT,
        equality,
        spread=steepest.spread,
        load=load,
        refused=refused,
        figures={**exponents, **costs, **figures},
    )
