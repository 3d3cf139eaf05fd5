"""The progress bar of the commands."""

from __future__ import annotations

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(total: int, done: int, unit: str, quiet: bool = False) -> tqdm:
    """Return a bar on stderr; in a log file, a line every half minute is a sign of life and no more.

    Args:
        total: number of things to do.
        done: how many of them are done already.
        unit: what one of them is called.
        quiet: show nothing.
    """
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=done, unit=unit, mininterval=interval, maxinterval=interval, disable=quiet)
