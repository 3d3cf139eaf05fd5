"""Running an evaluator over what is left to do."""

from __future__ import annotations

import logging
from collections.abc import Sized

from monai.engines import Evaluator

__all__ = ["run_pending"]


def run_pending(evaluator: Evaluator, dataset: Sized) -> None:
    """Run the evaluator, or say that everything is there already; an engine cannot run over nothing."""
    if len(dataset):
        evaluator.run()
    else:
        logging.getLogger(__name__).info("Nothing to do: every case has its result already.")
