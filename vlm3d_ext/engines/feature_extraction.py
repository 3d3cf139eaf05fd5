"""Running an evaluator over what is left to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized

from monai.engines import Evaluator

from .first_rank import wait_for_ranks

__all__ = ["run_pending"]


def run_pending(evaluator: Evaluator, dataset: Sized, otherwise: Callable[[], object] | None = None) -> None:
    """Run the evaluator, or say that everything is there already; an engine cannot run over nothing.

    Under torchrun it returns when all processes are done.

    Args:
        evaluator: over the data set.
        dataset: what is left to do for this process.
        otherwise: called where nothing is left.
    """
    if len(dataset):
        evaluator.run()
    else:
        logging.getLogger(__name__).info("Nothing to do: every case has its result already.")
        if otherwise is not None:
            otherwise()
    wait_for_ranks()
