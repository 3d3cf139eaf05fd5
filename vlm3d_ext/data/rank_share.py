"""Sharing work out between the processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["rank_and_world_size", "share_of_rank"]

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's number and how many there are, as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share_of_rank(work: Sequence[T]) -> list[T]:
    """Return what this process does of a list that is the same in all processes: each part is in one share only."""
    rank, world_size = rank_and_world_size()
    return list(work[rank::world_size])
