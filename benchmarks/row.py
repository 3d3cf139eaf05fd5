"""One line of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .measuring import MOST_LOAD_OF_OTHERS, PairedTimes

__all__ = ["MOST_SPREAD", "ResultsDiffer", "Row"]

# A ratio that varies by more is shown, but decides nothing.
MOST_SPREAD = 0.05


class ResultsDiffer(AssertionError):
    """The two sides of a row do not give the same result, so their speed cannot be compared."""


@dataclass(frozen=True)
class Row:
    """What a benchmark found.

    Args:
        name: of the benchmark.
        what: what is compared with what, in words.
        ratio: ours / peer, or the figure itself where there is no peer; None where it may not be told.
        target: largest ratio wanted, or None.
        equality: what was found equal on both sides before anything was measured.
        spread: share by which the ratio varies (distance between quartiles / median); None for exact counts.
        load: cores that other processes used meanwhile; None for exact counts.
        refused: why there is no ratio.
        figures: what else was measured, name -> value; the names carry the units.
    """

    name: str
    what: str
    ratio: float | None
    target: float | None
    equality: str
    spread: float | None = None
    load: float | None = None
    refused: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_times(
        cls, name: str, what: str, times: PairedTimes, target: float | None, equality: str, **figures: Any
    ) -> Row:
        """Return the row of timed pairs; refused if others kept the machine busy."""
        refused = ""
        if times.load > MOST_LOAD_OF_OTHERS:
            refused = (
                f"other processes used {times.load:.2f} cores, at most {MOST_LOAD_OF_OTHERS:g} allowed; stop them and "
                f"run it again"
            )
        return cls(
            name,
            what,
            None if refused else times.ratio,
            target,
            equality,
            spread=times.spread,
            load=times.load,
            refused=refused,
            figures={"ours_s": sorted(times.ours), "peer_s": sorted(times.peer), **figures},
        )

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, ``varies`` (by too much to decide), ``refused``, or nothing without a target."""
        if self.refused:
            return "refused"
        if self.target is None or self.ratio is None:
            return ""
        if self.spread is not None and self.spread > MOST_SPREAD:
            # far enough from the target, even a ratio that varies decides
            margin = self.ratio * self.spread
            if abs(self.ratio - self.target) < margin:
                return "varies"
        return "met" if self.ratio <= self.target else "missed"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON content."""
        return {**asdict(self), "verdict": self.verdict}
