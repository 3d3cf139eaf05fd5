"""One task's share of what a network in joint training returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["of_task"]


def of_task(task: str, names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Return an `output_transform` for a metric of one task.

    Args:
        task: key among the network's predictions, such as "classification".
        names: keys among that task's, such as "logits" and "labels".
    """

    def transform(output: Any) -> tuple[Any, ...]:
        return tuple(output["pred"][task][name] for name in names)

    return transform
