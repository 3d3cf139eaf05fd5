"""Comparison of the joint network with the single-task bundles as part of an evaluator's run."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ignite.engine import Engine, Events

from ..engines.task_comparison import write_task_comparison

__all__ = ["TaskComparison"]


class TaskComparison:
    """Writes the comparison when the evaluation's other handlers have written what they measured.

    It belongs after them and before what keeps the folder's files, such as `MLflowTracker`. See
    `write_task_comparison` for the files and the errors.

    Args:
        joint_dir: folder of this evaluation.
        single_task_dirs: task -> folder of the single-task bundle's evaluation.
    """

    def __init__(self, joint_dir: str | os.PathLike, single_task_dirs: Mapping[str, str | os.PathLike]) -> None:
        self.joint_dir = joint_dir
        self.single_task_dirs = dict(single_task_dirs)

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compare, write, and print."""
        write_task_comparison(self.joint_dir, self.single_task_dirs)
