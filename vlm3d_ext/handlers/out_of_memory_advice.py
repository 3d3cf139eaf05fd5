"""What to do when memory runs out, said where it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events

__all__ = ["OutOfMemoryAdvice"]

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class OutOfMemoryAdvice:
    """Adds to an out-of-memory error the options that use less, with their present values.

    The error itself goes on as it was, so that other handlers see it, trackers among them.

    Args:
        knobs: option -> its value, in the order in which to try them.
    """

    def __init__(self, knobs: Mapping[str, Any]) -> None:
        self.knobs = dict(knobs)

    def attach(self, engine: Engine) -> None:
        """Attach to any engine."""
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException) -> None:
        """Add the advice, and let the error go on."""
        # ignite fires this event twice, from the epoch and from the run
        if is_out_of_memory(error) and not getattr(error, "__notes__", None):
            options = ", ".join(f"--{name} (now {value})" for name, value in self.knobs.items())
            error.add_note(f"Out of memory. What uses less: {options}. The bundle's docs/README.md says what it needs.")
        # ignite takes an error for dealt with unless a handler raises it; a later one may have to see it first
        if engine._event_handlers[Events.EXCEPTION_RAISED][-1][0] is self:
            raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)
