"""What the processes of an inference say to each other: that they are done, and what the first one found.

Nothing else passes between them, so they talk over the CPU (gloo), whatever computes; and they wait long, because
after an interruption one of them may have hours to do, another nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..data.rank_share import rank_and_world_size

__all__ = ["join_ranks", "on_first_rank", "wait_for_ranks"]

_LONGEST_WAIT = datetime.timedelta(days=7)


def join_ranks() -> bool:
    """Join the processes of torchrun; returns whether there are several."""
    _, world_size = rank_and_world_size()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_LONGEST_WAIT)
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def wait_for_ranks() -> None:
    """Return when all processes that have joined come here."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def on_first_rank(work: Callable[..., Any], *arguments: Any) -> Any:
    """Have the first process do what only one may do, while no other does anything; returns its result in all of them.

    It begins when all have come here, with what they were asked to bring along ready.

    Args:
        work: what to do.
        arguments: of it.

    Raises:
        RuntimeError: in the other processes, if the first one failed, which raises its own error.
    """
    if not join_ranks():
        return work(*arguments)
    dist.barrier()
    if dist.get_rank() > 0:
        told: list[Any] = [None]
        dist.broadcast_object_list(told)
        error, result = told[0]
        if error is not None:
            raise RuntimeError(f"the first process could not do its part ({error}); its own message says more.")
        return result
    try:
        result = work(*arguments)
    except BaseException as error:
        dist.broadcast_object_list([(type(error).__name__, None)])
        raise
    dist.broadcast_object_list([(None, result)])
    return result
